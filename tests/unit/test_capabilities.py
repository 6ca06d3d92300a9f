from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import capabilities
from sandbox.capabilities import ALL, DEFAULT, capability_sets, mask_of
from sandbox.errors import InvalidSpec
from sandbox.spec import SecuritySpec

names = st.lists(st.sampled_from((*capabilities.NAMES, "ALL"))).map(tuple)


def bounding(**security: tuple[str, ...]) -> int:
    return capability_sets(SecuritySpec(**security)).bounding  # type: ignore[arg-type]


def test_bit_numbers_are_those_of_the_kernel() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert capabilities.NAMES[last] == "CHECKPOINT_RESTORE" or last > 40
    assert [mask_of([name]) for name in ("CHOWN", "SYS_ADMIN", "SYSLOG", "CHECKPOINT_RESTORE")] == [
        1 << 0,
        1 << 21,
        1 << 34,
        1 << 40,
    ]


def test_default_set_has_fourteen_capabilities() -> None:
    assert bounding() == DEFAULT == 0xA80425FB


@pytest.mark.parametrize("spelling", ["NET_ADMIN", "net_admin", "CAP_NET_ADMIN", "cap_net_admin"])
def test_name_in_any_case_and_with_prefix_is_accepted(spelling: str) -> None:
    assert bounding(add_capabilities=(spelling,)) == DEFAULT | mask_of(["NET_ADMIN"])


@pytest.mark.parametrize(
    ("add", "drop", "wanted"),
    [
        (("ALL",), (), ALL),
        ((), ("ALL",), 0),
        (("ALL",), ("NET_RAW",), ALL & ~mask_of(["NET_RAW"])),
        (("CHOWN",), ("ALL",), mask_of(["CHOWN"])),
        (("ALL",), ("ALL",), 0),
        (("SYS_TIME",), ("SYS_TIME",), DEFAULT),
    ],
)
def test_all_applies_before_single_names_and_drops_after_adds(
    add: tuple[str, ...], drop: tuple[str, ...], wanted: int
) -> None:
    assert bounding(add_capabilities=add, drop_capabilities=drop) == wanted


def test_privileged_has_all_capabilities_whatever_is_dropped() -> None:
    sets = capability_sets(SecuritySpec(privileged=True, drop_capabilities=("ALL",)))
    assert (sets.bounding, sets.permitted, sets.effective) == (ALL, ALL, ALL)
    assert (sets.inheritable, sets.ambient) == (0, 0)


def test_ambient_capabilities_are_in_every_set() -> None:
    sets = capability_sets(SecuritySpec(drop_capabilities=("ALL",), ambient_capabilities=("NET_RAW",)))
    assert {sets.bounding, sets.permitted, sets.effective, sets.inheritable, sets.ambient} == {
        mask_of(["NET_RAW"])
    }


@pytest.mark.parametrize("field", ["add_capabilities", "drop_capabilities", "ambient_capabilities"])
def test_unknown_name_is_refused_with_its_field(field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        capability_sets(SecuritySpec(**{field: ("CHOWN", "CAP_FLY")}))  # type: ignore[arg-type]
    assert field.removeprefix("ambient") in caught.value.field
    assert caught.value.field.endswith("[1]")
    assert "CAP_FLY" in str(caught.value)


@given(add=names, drop=names, ambient=names)
def test_sets_obey_the_kernel(add: tuple[str, ...], drop: tuple[str, ...], ambient: tuple[str, ...]) -> None:
    sets = capability_sets(
        SecuritySpec(add_capabilities=add, drop_capabilities=drop, ambient_capabilities=ambient)
    )
    assert sets.effective & ~sets.permitted == 0
    assert sets.permitted & ~sets.bounding == 0
    assert sets.ambient & ~(sets.permitted & sets.inheritable) == 0
    assert sets.bounding & mask_of(name for name in drop if name != "ALL") == 0
