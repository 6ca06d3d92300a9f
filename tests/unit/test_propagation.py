"""Which mounts of a container the host repeats, by the mount table that its guest reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.spec import MountSpec, Propagation
from sandbox.vm_pods.propagation import MAX_MOUNTS, PropagationRequest, find_requests

BOTH = MountSpec(container_path="/both/", host_path="/h", propagation=Propagation.BIDIRECTIONAL)
PRIVATE = MountSpec(container_path="/data", host_path="/d")
INNER = MountSpec(container_path="/both/private", host_path="/p")
IMAGE = MountSpec(container_path="/image", host_path="", image="i", readonly=True)
PART = MountSpec(container_path="/part", host_path="/v/part")
SPECS = (BOTH, PRIVATE, INNER, IMAGE, PART)

TABLE = r"""
20 1 0:30 /c1 / rw - virtiofs none rw
21 20 0:31 / /proc rw - proc proc rw
22 20 0:40 / /both rw - virtiofs none rw
23 20 0:41 / /data rw - virtiofs none rw
24 22 0:42 / /both/private rw - virtiofs none rw
25 20 0:43 / /image ro - virtiofs none rw
26 20 0:44 /part /part rw - virtiofs none rw
"""


def line(device: str, root: str, point: str) -> str:
    return f"{TABLE}99 22 {device} {root} {point} rw - virtiofs none rw\n"


@pytest.mark.parametrize(
    ("added", "requests"),
    [
        (
            ("0:30", "/c1/etc", "/both/point"),
            [PropagationRequest(target_volume=0, target="point", volume=None, source="/etc")],
        ),
        (
            ("0:41", "/x", "/both/a/b"),
            [PropagationRequest(target_volume=0, target="a/b", volume=1, source="/x")],
        ),
        (
            ("0:30", r"/c1/with\040space", r"/both/a\134b"),
            [PropagationRequest(target_volume=0, target=r"a\b", volume=None, source="/with space")],
        ),
        (
            ("0:30", "/c1", "/both/all"),
            [PropagationRequest(target_volume=0, target="all", volume=None, source="/")],
        ),
        (
            ("0:44", "/part/x/y", "/both/of-a-part"),
            [PropagationRequest(target_volume=0, target="of-a-part", volume=4, source="/x/y")],
        ),
        (("0:44", "/beside", "/both/of-another"), []),
        (("0:30", "/c2/etc", "/both/of-another"), []),
        (("0:30", "/c10/etc", "/both/of-another"), []),
        (("0:55", "/", "/both/tmpfs"), []),
        (("0:43", "/bin", "/both/image"), []),
        (("0:30", "/c1/etc", "/data/point"), []),
        (("0:30", "/c1/etc", "/both/private/point"), []),
        (("0:30", "/c1/etc", "/bothersome"), []),
        (("0:30", "/c1/etc", "/both"), []),
        (("0:30", "/c1/etc", "/both/../x"), []),
    ],
)
def test_requests_are_found_for_mounts_from_the_root_and_volumes(
    added: tuple[str, str, str], requests: list[PropagationRequest]
) -> None:
    assert find_requests(line(*added), SPECS) == requests


def test_number_of_requests_is_bounded() -> None:
    text = TABLE + "".join(f"{n} 22 0:30 /c1/etc /both/{n} rw - virtiofs none rw\n" for n in range(1000))
    assert len(find_requests(text, SPECS)) == MAX_MOUNTS


@given(st.text())
def test_any_table_gives_targets_inside_the_volume(text: str) -> None:
    for request in find_requests(TABLE + text, SPECS):
        assert not request.target.startswith(("/", ".."))
