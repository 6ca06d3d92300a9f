"""The gRPC server: its socket, requests and responses as a whole, metrics and the log of calls."""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri import server
from cri.interceptor import is_read_only
from cri.proto import runtime_v1_pb2 as pb
from cri.server import SocketTaken
from tests.contract.cri.runtime import (
    CRI_METHODS,
    METHODS,
    POD,
    SERVED,
    STREAMED,
    Code,
    Runtime,
)
from tests.kit.eventually import eventually


async def test_socket_has_mode_0600(runtime: Runtime) -> None:
    assert stat.S_IMODE(runtime.socket.stat().st_mode) == 0o600


async def test_socket_in_use_by_another_daemon_is_kept(runtime: Runtime) -> None:
    with pytest.raises(SocketTaken, match="another daemon"):
        await runtime.server().start()
    assert await runtime.code("Version") is Code.OK


async def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "husk.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    runtime = Runtime(path)
    await runtime.start()
    assert await runtime.code("Version") is Code.OK
    await runtime.stop()
    assert not path.exists()


async def test_file_that_is_not_a_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "husk.sock"
    path.write_text("precious")
    with pytest.raises(SocketTaken, match="not a socket"):
        await Runtime(path).server().start()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", [name for name in CRI_METHODS if name not in SERVED | STREAMED])
async def test_rpc_that_is_not_implemented_answers_unimplemented(runtime: Runtime, name: str) -> None:
    _, method = METHODS[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method.server_streaming:
            [answer async for answer in runtime.call(name)]
        else:
            await runtime.call(name)
    assert caught.value.code() is Code.UNIMPLEMENTED
    assert caught.value.details() == f"husk does not implement {name}"


async def test_rpc_with_empty_request_is_answered_or_refused(runtime: Runtime) -> None:
    """With an empty request: an answer or a refusal, never UNIMPLEMENTED or a bug."""
    codes = {name: await runtime.code(name) for name in SERVED}
    assert not {name for name, code in codes.items() if code in (Code.UNIMPLEMENTED, Code.INTERNAL)}


async def test_unparsable_request_is_an_invalid_argument(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC's own answer would be INTERNAL, and a traceback in the daemon's log."""
    stub: Any = runtime.channel.unary_unary("/runtime.v1.RuntimeService/RunPodSandbox")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(b"\xff")
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("request: cannot be parsed")
    assert not [record for record in caplog.records if record.exc_info]


async def test_call_is_measured_and_logged_once(runtime: Runtime, caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG, logger="cri"):
        await runtime.call("Version")
        await runtime.pod()
    logged = [(record.getMessage(), record.levelname, record.fields["code"]) for record in caplog.records]
    assert logged == [("Version", "DEBUG", "OK"), ("RunPodSandbox", "INFO", "OK")]
    count = runtime.metrics.registry.get_sample_value
    assert count("husk_cri_call_seconds_count", {"method": "RunPodSandbox", "code": "OK"}) == 1
    assert count("husk_cri_calls_running") == 0


def test_read_only_rpcs_are_recognized_by_name() -> None:
    quiet = {name for name in CRI_METHODS if is_read_only(name)}
    assert {"Version", "Status", "ListContainers", "ContainerStats", "ImageFsInfo", "RuntimeConfig"} <= quiet
    assert {"StreamContainers", "ListPodSandboxMetrics", "ListMetricDescriptors"} <= quiet
    assert not quiet & {"UpdatePodSandboxResources", "GetContainerEvents", "RemovePodSandbox"}
    assert not quiet & {"RunPodSandbox", "ExecSync", "UpdateRuntimeConfig", "PullImage", "RemoveImage"}


async def test_deadline_and_cancellation_are_counted_apart(runtime: Runtime) -> None:
    runtime.pods.gate = asyncio.Event()
    count = runtime.metrics.registry.get_sample_value

    def ended(code: str) -> bool:
        return count("husk_cri_call_seconds_count", {"method": "RunPodSandbox", "code": code}) == 1

    request = pb.RunPodSandboxRequest(config=POD)
    with pytest.raises(grpc.aio.AioRpcError):
        await runtime.call("RunPodSandbox", request, timeout_s=0.2)
    await eventually(lambda: ended("DEADLINE_EXCEEDED"))
    call = runtime.call("RunPodSandbox", request)
    await eventually(lambda: count("husk_cri_calls_running") == 1)
    call.cancel()
    await eventually(lambda: ended("CANCELLED"))


async def test_messages_are_limited_to_16_mib(runtime: Runtime) -> None:
    id = await runtime.pod(annotations={"big": "x" * (15 << 20)})
    answer = await runtime.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=id))
    assert len(answer.status.annotations["big"]) == 15 << 20
    request = pb.RunPodSandboxRequest(config=POD, runtime_handler="x" * (17 << 20))
    assert await runtime.code("RunPodSandbox", request) is Code.RESOURCE_EXHAUSTED


async def test_long_list_is_complete(runtime: Runtime) -> None:
    ids = {await runtime.pod(f"pod-{n}") for n in range(100)}
    for _ in range(2):
        assert {item.id for item in (await runtime.call("ListPodSandbox")).items} == ids


async def test_calls_beyond_the_limit_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CALLS_MAX", 2)
    runtime = Runtime(tmp_path / "husk.sock")
    await runtime.start()
    runtime.images.gate = asyncio.Event()
    request = pb.PullImageRequest(image=pb.ImageSpec(image="a"))
    pulls = [asyncio.ensure_future(runtime.call("PullImage", request)) for _ in range(2)]
    count = runtime.metrics.registry.get_sample_value
    await eventually(lambda: count("husk_cri_calls_running") == 2)
    assert await runtime.code("Version") is Code.RESOURCE_EXHAUSTED
    runtime.images.gate.set()
    await asyncio.gather(*pulls)
    assert await runtime.code("Version") is Code.OK
    await runtime.stop()
