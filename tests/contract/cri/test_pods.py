"""Pod sandboxes: life cycle, retries, and how failures are reported."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import grpc
import pytest

from cri.ports import Features
from cri.proto import runtime_v1_pb2 as pb
from sandbox.errors import PhaseFailed
from tests.contract.cri.runtime import (
    CONTAINER,
    POD,
    Code,
    Runtime,
)


async def test_pod_from_run_to_remove(runtime: Runtime) -> None:
    id = await runtime.pod(labels={"app": "web"}, annotations={"note": "x"})
    answer = await runtime.call(
        "PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=id[:13], verbose=True)
    )
    assert (answer.status.id, answer.status.state) == (id, pb.SANDBOX_READY)
    assert answer.status.metadata.namespace == "default"
    assert answer.status.network.ip == "10.9.0.2"
    assert (dict(answer.status.labels), dict(answer.status.annotations)) == ({"app": "web"}, {"note": "x"})
    assert json.loads(answer.info["info"])["accelerator"] == "tcg"
    assert answer.timestamp > 0
    container = await runtime.container(id)
    answer = await runtime.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=id))
    assert [one.id for one in answer.containers_statuses] == [container]
    assert not answer.info
    await runtime.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=id))
    listed = await runtime.call("ListPodSandbox")
    assert [(item.id, item.state) for item in listed.items] == [(id, pb.SANDBOX_NOTREADY)]
    await runtime.call("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=id))
    assert not (await runtime.call("ListPodSandbox")).items
    assert (
        await runtime.code("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=id))
        is Code.NOT_FOUND
    )


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id="unknown")),
        ("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id="unknown")),
        ("StopContainer", pb.StopContainerRequest(container_id="unknown")),
        ("RemoveContainer", pb.RemoveContainerRequest(container_id="unknown")),
        ("RemoveImage", pb.RemoveImageRequest(image=pb.ImageSpec(image="unknown"))),
        ("ImageStatus", pb.ImageStatusRequest(image=pb.ImageSpec(image="unknown"))),
        ("ListPodSandbox", pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(id="unknown"))),
        ("ListContainers", pb.ListContainersRequest(filter=pb.ContainerFilter(id="unknown"))),
        ("ListContainerStats", pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(id="unknown"))),
    ],
)
async def test_unknown_id_in_an_idempotent_call_is_ignored(
    runtime: Runtime, name: str, request_: Any
) -> None:
    assert await runtime.code(name, request_) is Code.OK


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id="unknown")),
        ("ContainerStatus", pb.ContainerStatusRequest(container_id="unknown")),
        ("StartContainer", pb.StartContainerRequest(container_id="unknown")),
        ("ExecSync", pb.ExecSyncRequest(container_id="unknown", cmd=["true"])),
        ("ContainerStats", pb.ContainerStatsRequest(container_id="unknown")),
        ("UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id="unknown")),
        ("ReopenContainerLog", pb.ReopenContainerLogRequest(container_id="unknown")),
        ("CreateContainer", pb.CreateContainerRequest(pod_sandbox_id="unknown", config=CONTAINER)),
    ],
)
async def test_unknown_id_in_any_other_call_is_not_found(runtime: Runtime, name: str, request_: Any) -> None:
    assert await runtime.code(name, request_) is Code.NOT_FOUND


async def test_pod_with_a_reserved_name_is_refused(runtime: Runtime) -> None:
    await runtime.pod()
    assert (
        await runtime.code("RunPodSandbox", pb.RunPodSandboxRequest(config=POD)) is Code.FAILED_PRECONDITION
    )


async def test_user_namespace_on_a_disk_without_id_mapping_is_refused(runtime: Runtime) -> None:
    config = pb.PodSandboxConfig()
    config.CopyFrom(POD)
    ids = pb.IDMapping(container_id=0, host_id=1000, length=10)
    space = pb.UserNamespace(mode=pb.POD, uids=[ids], gids=[ids])
    config.linux.security_context.namespace_options.userns_options.CopyFrom(space)
    request = pb.RunPodSandboxRequest(config=config)
    runtime.node.features = Features(user_namespace_obstacle="the disk cannot")
    code, details = await runtime.refused("RunPodSandbox", request)
    assert code is Code.INVALID_ARGUMENT
    assert "userns_options.mode" in details
    assert "the disk cannot" in details
    runtime.node.features = Features(user_namespaces=True)
    await runtime.call("RunPodSandbox", request)


async def test_refused_field_is_named_by_its_path(runtime: Runtime) -> None:
    config = pb.PodSandboxConfig()
    config.CopyFrom(POD)
    config.linux.security_context.namespace_options.network = pb.CONTAINER
    code, details = await runtime.refused("RunPodSandbox", pb.RunPodSandboxRequest(config=config))
    assert code is Code.INVALID_ARGUMENT
    assert details.startswith("config.linux.security_context.namespace_options.network: CONTAINER")
    assert runtime.pods.runs == 0


async def test_run_continues_after_its_deadline_and_a_retry_joins_it(runtime: Runtime) -> None:
    runtime.pods.gate = asyncio.Event()
    request = pb.RunPodSandboxRequest(config=POD)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await runtime.call("RunPodSandbox", request, timeout_s=0.2)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    retry = await runtime.retried("RunPodSandbox", request)
    runtime.pods.gate.set()
    assert (await retry).pod_sandbox_id in runtime.pods.records
    assert runtime.pods.runs == 1


async def test_failed_start_names_its_phase_and_ends_with_the_console(runtime: Runtime, caplog: Any) -> None:
    console = "\n".join(f"[{n}] starting ü" for n in range(5000)) + "\nKernel panic"
    runtime.pods.failure = PhaseFailed("vm", 2.5, "the guest did not answer", console)
    with caplog.at_level(logging.INFO, logger="cri"):
        code, details = await runtime.refused("RunPodSandbox", pb.RunPodSandboxRequest(config=POD))
    assert code is Code.INTERNAL
    assert details.startswith("vm failed after 2.50 s: the guest did not answer")
    assert details.endswith("Kernel panic")
    (record,) = [record for record in caplog.records if record.name == "cri"]
    assert record.levelno == logging.ERROR
    assert "[42] starting" in record.fields["error"], "the log has the whole console"


async def test_unexpected_error_has_a_tag_that_is_logged_too(runtime: Runtime, caplog: Any) -> None:
    runtime.pods.failure = KeyError("oops")
    with caplog.at_level(logging.DEBUG, logger="cri"):
        code, details = await runtime.refused("RunPodSandbox", pb.RunPodSandboxRequest(config=POD))
    assert code is Code.INTERNAL
    assert details.startswith("internal error ")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.fields["error"] for record in errors] == [details]
    assert any(record.levelno == logging.DEBUG and record.exc_info for record in caplog.records)
