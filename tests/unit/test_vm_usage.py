"""A usage sample over the wire: one request, and replies of agents that send other values."""

from __future__ import annotations

import pytest

from sandbox.errors import ProtocolError
from sandbox.guest import guest_pb2 as pb
from sandbox.spec import ContainerId
from sandbox.usage import CGROUP_FILES, ProcessCount
from sandbox.vm_pods.usage import PATHS, decode_usage, usage_request


def reply(containers: int, *counts: pb.ProcessCount) -> pb.CgroupValues:
    """Each value names its cgroup and file; the last two are those of PATHS."""
    files = [f"{number} {name}".encode() for number in range(1 + containers) for name in CGROUP_FILES]
    return pb.CgroupValues(values=[*files, b"net", b"memory"], wall_ns=7, counts=counts)


def test_one_request_covers_pod_and_containers() -> None:
    request = usage_request([ContainerId("a"), ContainerId("b")], files=False).read_cgroup
    assert list(request.container_ids) == [".", "a", "b"]
    assert (tuple(request.names), tuple(request.paths)) == (CGROUP_FILES, PATHS)
    assert request.count == pb.ReadCgroup.PROCESSES
    assert usage_request([], files=True).read_cgroup.count == pb.ReadCgroup.FILES


def test_reply_is_decoded_in_the_order_of_the_request() -> None:
    counts = (pb.ProcessCount(processes=5), pb.ProcessCount(processes=2, files=30, sockets=4))
    sample = decode_usage(reply(2, *counts), 2)
    assert (sample.wall_ns, sample.net_dev, sample.meminfo) == (7, b"net", b"memory")
    for number, cgroup in enumerate((sample.pod, *sample.containers)):
        assert cgroup.files == {name: f"{number} {name}".encode() for name in CGROUP_FILES}
    assert sample.pod.count == ProcessCount(processes=5)
    assert sample.containers[0].count == ProcessCount(processes=2, files=30, sockets=4)
    assert sample.containers[1].count == ProcessCount()


def test_wrong_number_of_values_is_a_protocol_error() -> None:
    values = reply(1)
    values.values.append(b"more")
    with pytest.raises(ProtocolError, match="35 values instead of 34"):
        decode_usage(values, 1)
    with pytest.raises(ProtocolError, match="0 values"):
        decode_usage(pb.CgroupValues(), 1)


def test_missing_counts_are_zero_and_excess_ones_ignored() -> None:
    (container,) = decode_usage(reply(1), 1).containers
    assert container.count == ProcessCount()
    (container,) = decode_usage(reply(1, *[pb.ProcessCount(processes=1)] * 50), 1).containers
    assert container.count == ProcessCount(processes=1)
