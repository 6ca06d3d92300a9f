"""Accounting files of any content: no exception, numbers that fit the wire, and no names but the host's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.responses import pod_metrics
from cri.responses import usage as usage_messages
from cri.responses.pod_metrics import Filesystem, Measured
from sandbox.errors import ProtocolError
from sandbox.guest import guest_pb2 as pb
from sandbox.records import ContainerRecord, PodRecord
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, PodId, PodSpec
from sandbox.stats import parse
from sandbox.stats.kernel_files import NUMBER_MAX
from sandbox.usage import CGROUP_FILES
from sandbox.vm_pods.usage import PATHS, decode_usage

PART = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"some",
            b"full",
            b"avg10=",
            b"total=",
            b"usage_usec",
            b"8:0",
            b"rbytes=",
            b"eth0:",
            b"MemTotal:",
            b"kB",
        ]
    ),
    st.integers().map(lambda n: str(n).encode()),
    st.floats().map(lambda n: str(n).encode()),
    st.sampled_from([b" ", b"\n", b"=", b":", b"\t", b"\0", b"max"]),
)
FILE = st.lists(PART, max_size=30).map(b"".join)
POD = PodRecord(id=PodId("p"), spec=PodSpec(name="n", namespace="ns", uid="u"), created_at_ns=1)
CONTAINER = ContainerRecord(
    id=ContainerId("c"),
    pod_id=PodId("p"),
    spec=ContainerSpec(name="c", image="i"),
    created_at_ns=1,
    image_id="i",
    image_ref="i",
    defaults=ImageDefaults(),
)
DISK = Filesystem(device="8:1", total_bytes=1, total_inodes=1, free_inodes=1)


@given(
    files=st.lists(
        FILE, min_size=2 * len(CGROUP_FILES) + len(PATHS), max_size=2 * len(CGROUP_FILES) + len(PATHS)
    ),
    wall_ns=st.integers(-(2**63), 2**63 - 1),
    counts=st.lists(st.integers(0, 2**32 - 1), max_size=4),
)
def test_any_contents_parse_and_fit_the_wire(files: list[bytes], wall_ns: int, counts: list[int]) -> None:
    answer = pb.CgroupValues(values=files, wall_ns=wall_ns)
    answer.counts.extend(pb.ProcessCount(processes=n, files=n, sockets=n) for n in counts)
    found = parse.parse(POD.id, [CONTAINER.id], ["eth0"], decode_usage(answer, 1), 9)
    (container,) = found.containers
    for usage in (found.usage, container.usage):
        assert 0 <= usage.cpu.usage_ns <= NUMBER_MAX
        assert 0 <= usage.memory.available <= NUMBER_MAX
        for psi in (usage.cpu.psi, usage.memory.psi, usage.io_psi):
            assert psi is None or math.isfinite(psi.some.avg10 + psi.full.avg300)
    assert {nic.name for nic in found.interfaces} <= {"eth0"}
    # and all of it can be encoded for the CRI
    wire = usage_messages.container_stats(CONTAINER, container, "/")
    assert usage_messages.pod_stats(POD, found, [wire]).SerializeToString()
    measured = Measured(record=CONTAINER, stats=container, open_files_limit=1, filesystem=DISK, now_ns=1)
    keys = {metric.name: len(metric.label_keys) for metric in pod_metrics.descriptors()}
    metrics = pod_metrics.pod_metrics(POD, found, [measured])
    assert metrics.SerializeToString()
    for metric in [*metrics.metrics, *metrics.container_metrics[0].metrics]:
        assert len(metric.label_values) == keys[metric.name]


@given(count=st.integers(0, 100), value=FILE)
def test_wrong_number_of_values_is_a_protocol_error(count: int, value: bytes) -> None:
    answer = pb.CgroupValues(values=[value] * count)
    if count == 2 * len(CGROUP_FILES) + len(PATHS):
        assert parse.parse(POD.id, [CONTAINER.id], ["eth0"], decode_usage(answer, 1), 9)
        return
    with pytest.raises(ProtocolError, match=f"{count} values"):
        decode_usage(answer, 1)
