"""The URLs of Exec, Attach and PortForward."""

from __future__ import annotations

from cri.proto import runtime_v1_pb2 as pb
from cri.streaming.session import AttachOptions, ExecOptions, PortForwardOptions
from tests.contract.cri.runtime import (
    Code,
    Runtime,
)


async def test_exec_attach_and_port_forward_return_urls(runtime: Runtime) -> None:
    pod = await runtime.pod()
    id = await runtime.started(pod)
    exec = pb.ExecRequest(container_id=id[:13], cmd=["sh", "-c", "x"], tty=True, stdin=True, stdout=True)
    assert (await runtime.call("Exec", exec)).url == "http://127.0.0.1:1/1"
    attach = pb.AttachRequest(container_id=id, stdout=True, stderr=True)
    assert (await runtime.call("Attach", attach)).url == "http://127.0.0.1:1/2"
    forward = pb.PortForwardRequest(pod_sandbox_id=pod[:13], port=[80, 65535])
    assert (await runtime.call("PortForward", forward)).url == "http://127.0.0.1:1/3"
    assert runtime.streaming.requests == [
        ExecOptions(id, ("sh", "-c", "x"), tty=True, stdin=True, stdout=True, stderr=False),
        AttachOptions(id, tty=False, stdin=False, stdout=True, stderr=True),
        PortForwardOptions(pod, (80, 65535)),
    ]


async def test_session_with_invalid_streams_or_ports_is_refused(runtime: Runtime) -> None:
    pod = await runtime.pod()
    id = await runtime.started(pod)
    for request, expected in (
        (pb.ExecRequest(container_id=id, cmd=["x"]), "stdin, stdout, stderr"),
        (pb.ExecRequest(container_id=id, cmd=["x"], tty=True, stdout=True, stderr=True), "stderr"),
        (pb.ExecRequest(container_id=id, stdout=True), "cmd"),
        (pb.AttachRequest(container_id=id), "stdin, stdout, stderr"),
        (pb.AttachRequest(container_id=id, tty=True, stderr=True), "stderr"),
        (pb.PortForwardRequest(pod_sandbox_id=pod, port=[0]), "port"),
        (pb.PortForwardRequest(pod_sandbox_id=pod, port=[65536]), "port"),
    ):
        name = type(request).__name__.removesuffix("Request")
        code, details = await runtime.refused(name, request)
        assert code is Code.INVALID_ARGUMENT
        assert details.startswith(expected)


async def test_session_in_a_stopped_or_unknown_object_is_refused(runtime: Runtime) -> None:
    pod = await runtime.pod()
    id = await runtime.container(pod)  # not started
    exec = pb.ExecRequest(container_id=id, cmd=["x"], stdout=True)
    attach = pb.AttachRequest(container_id=id, stdout=True)
    forward = pb.PortForwardRequest(pod_sandbox_id=pod)
    assert await runtime.code("PortForward", forward) is Code.OK
    await runtime.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    for name, request in (("Exec", exec), ("Attach", attach), ("PortForward", forward)):
        assert await runtime.code(name, request) is Code.FAILED_PRECONDITION
    exec.container_id = attach.container_id = forward.pod_sandbox_id = "unknown"
    for name, request in (("Exec", exec), ("Attach", attach), ("PortForward", forward)):
        assert await runtime.code(name, request) is Code.NOT_FOUND


async def test_session_beyond_the_limit_of_tokens_is_refused(runtime: Runtime) -> None:
    runtime.streaming.full = True
    forward = pb.PortForwardRequest(pod_sandbox_id=await runtime.pod())
    assert await runtime.code("PortForward", forward) is Code.RESOURCE_EXHAUSTED
