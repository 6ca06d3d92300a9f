"""A usage sample as the guest sends it: one ReadCgroup for a pod and all of its containers. Pure.

The reply holds CGROUP_FILES of the cgroup that contains all containers, then those of each container, then
PATHS; and a count for each cgroup.
"""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.errors import ProtocolError
from sandbox.guest import guest_pb2 as pb
from sandbox.spec import ContainerId
from sandbox.usage import CGROUP_FILES, CgroupSample, ProcessCount, UsageSample

POD_CGROUP = "."  # the agent's name of the cgroup that holds those of all containers
PATHS = ("/proc/net/dev", "/proc/meminfo")


def usage_request(container_ids: Sequence[ContainerId], *, files: bool) -> pb.Request:
    """Compose the request; `files` counts open descriptors and sockets, else processes alone."""
    count = pb.ReadCgroup.FILES if files else pb.ReadCgroup.PROCESSES
    ids = [POD_CGROUP, *container_ids]
    return pb.Request(
        read_cgroup=pb.ReadCgroup(container_ids=ids, names=CGROUP_FILES, paths=PATHS, count=count)
    )


def decode_usage(values: pb.CgroupValues, containers: int) -> UsageSample:
    """Decode the reply to a request for so many containers. Missing counts are 0, excess ones are ignored.

    Raises ProtocolError when the number of values is not what was requested.
    """
    expected = (1 + containers) * len(CGROUP_FILES) + len(PATHS)
    if len(values.values) != expected:
        raise ProtocolError(
            f"the agent answered a usage request with {len(values.values)} values instead of {expected}"
        )
    pod, *each = (_cgroup(values, number) for number in range(1 + containers))
    net_dev, meminfo = values.values[-len(PATHS) :]
    return UsageSample(
        wall_ns=values.wall_ns, pod=pod, containers=tuple(each), net_dev=net_dev, meminfo=meminfo
    )


def _cgroup(values: pb.CgroupValues, number: int) -> CgroupSample:
    start = number * len(CGROUP_FILES)
    contents = values.values[start : start + len(CGROUP_FILES)]
    files = dict(zip(CGROUP_FILES, contents, strict=True))
    if number >= len(values.counts):
        return CgroupSample(files=files)
    count = values.counts[number]
    found = ProcessCount(processes=count.processes, files=count.files, sockets=count.sockets)
    return CgroupSample(files=files, count=found)
