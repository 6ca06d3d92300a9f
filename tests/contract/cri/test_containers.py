"""Containers: life cycle, exec, resources."""

from __future__ import annotations

import json

from cri.proto import runtime_v1_pb2 as pb
from tests.contract.cri.runtime import (
    Code,
    Runtime,
)


async def test_container_from_create_to_remove(runtime: Runtime) -> None:
    pod_id = await runtime.pod()
    id = await runtime.container(pod_id[:13], labels={"a": "b"}, stop_signal=pb.SIGNAL_SIGUSR1)
    status = (await runtime.call("ContainerStatus", pb.ContainerStatusRequest(container_id=id[:13]))).status
    assert (status.id, status.state, status.image.image) == (id, pb.CONTAINER_CREATED, "busybox")
    assert status.image_ref and status.created_at and status.stop_signal == pb.SIGNAL_SIGUSR1
    assert (status.started_at, status.finished_at) == (0, 0)
    await runtime.call("StartContainer", pb.StartContainerRequest(container_id=id))
    again = await runtime.code("StartContainer", pb.StartContainerRequest(container_id=id))
    assert again is Code.FAILED_PRECONDITION
    await runtime.call("StopContainer", pb.StopContainerRequest(container_id=id[:13], timeout=7))
    assert runtime.containers.stops == [(id, 7.0)]
    answer = await runtime.call("ContainerStatus", pb.ContainerStatusRequest(container_id=id, verbose=True))
    assert (answer.status.state, answer.status.exit_code) == (pb.CONTAINER_EXITED, 137)
    assert json.loads(answer.info["info"]) == {"rootfs": "/somewhere"}
    await runtime.call("RemoveContainer", pb.RemoveContainerRequest(container_id=id))
    assert not (await runtime.call("ListContainers")).containers


async def test_stop_with_shorter_timeout_does_not_join_a_longer_one(runtime: Runtime) -> None:
    id = await runtime.started(await runtime.pod())
    for timeout in (30, 0, -5):
        await runtime.call("StopContainer", pb.StopContainerRequest(container_id=id, timeout=timeout))
    assert [seconds for _, seconds in runtime.containers.stops] == [30.0, 0.0, 0.0]


async def test_exec_sync_returns_output_and_exit_code(runtime: Runtime) -> None:
    id = await runtime.started(await runtime.pod())
    answer = await runtime.call("ExecSync", pb.ExecSyncRequest(container_id=id, cmd=["a", "b"], timeout=5))
    assert (answer.exit_code, answer.stdout, answer.stderr) == (3, b"out\n", b"err\n")
    await runtime.call("ExecSync", pb.ExecSyncRequest(container_id=id, cmd=["a"]))
    assert runtime.containers.execs == [(["a", "b"], 5.0), (["a"], None)]
    assert await runtime.code("ExecSync", pb.ExecSyncRequest(container_id=id)) is Code.INVALID_ARGUMENT


async def test_exec_sync_before_start_is_refused(runtime: Runtime) -> None:
    id = await runtime.container(await runtime.pod())
    request = pb.ExecSyncRequest(container_id=id, cmd=["a"])
    assert await runtime.code("ExecSync", request) is Code.FAILED_PRECONDITION


async def test_status_shows_updated_limits(runtime: Runtime) -> None:
    id = await runtime.started(await runtime.pod())
    linux = pb.LinuxContainerResources(cpu_quota=20000, memory_limit_in_bytes=1 << 28)
    await runtime.call(
        "UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id=id, linux=linux)
    )
    status = (await runtime.call("ContainerStatus", pb.ContainerStatusRequest(container_id=id))).status
    assert status.resources.linux.memory_limit_in_bytes == 1 << 28
    await runtime.call("ReopenContainerLog", pb.ReopenContainerLogRequest(container_id=id))
    assert runtime.containers.reopened == [id]


async def test_repeated_status_follows_changes_and_removal(runtime: Runtime) -> None:
    """Encoded statuses are cached by record; a verbose one is not."""
    id = await runtime.container(await runtime.pod())
    request = pb.ContainerStatusRequest(container_id=id)
    plain = [await runtime.call("ContainerStatus", request) for _ in range(2)]
    verbose = await runtime.call("ContainerStatus", pb.ContainerStatusRequest(container_id=id, verbose=True))
    assert plain[0].status == plain[1].status == verbose.status
    assert not plain[0].info
    await runtime.call("StartContainer", pb.StartContainerRequest(container_id=id))
    status = (await runtime.call("ContainerStatus", request)).status
    assert status.state == pb.CONTAINER_RUNNING
    await runtime.call("RemoveContainer", pb.RemoveContainerRequest(container_id=id))
    assert await runtime.code("ContainerStatus", request) is Code.NOT_FOUND
