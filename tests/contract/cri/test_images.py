"""Images: pulls, removal, and the streamed pulls and imports of `husk image`."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest

from cri.proto import husk_v1_pb2 as husk
from cri.proto import runtime_v1_pb2 as pb
from image.errors import RegistryUnavailable
from tests.contract.cri.runtime import (
    Code,
    Runtime,
)
from tests.kit.eventually import eventually


async def test_registry_token_that_no_header_can_carry_is_refused_without_repeating_it(
    runtime: Runtime,
) -> None:
    auth = pb.AuthConfig(registry_token="sécret")
    request = pb.PullImageRequest(image=pb.ImageSpec(image="a"), auth=auth)
    code, details = await runtime.refused("PullImage", request)
    assert code is Code.INVALID_ARGUMENT
    assert "auth.registry_token" in details
    assert "cret" not in details


async def test_image_from_pull_to_remove(runtime: Runtime) -> None:
    auth = pb.AuthConfig(username="me", password="secret", server_address="example.test")
    spec = pb.ImageSpec(image="example.test/a:1")
    answer = await runtime.call("PullImage", pb.PullImageRequest(image=spec, auth=auth))
    ((ref, used),) = runtime.images.pulls
    assert used is not None and (ref, used.username, used.password) == ("example.test/a:1", "me", "secret")
    status = await runtime.call("ImageStatus", pb.ImageStatusRequest(image=spec, verbose=True))
    assert (status.image.id, status.image.uid.value, status.image.username) == (answer.image_ref, 1003, "")
    assert json.loads(status.info["info"])["created"] == "then"
    listed = await runtime.call("ListImages", pb.ListImagesRequest(filter=pb.ImageFilter(image=spec)))
    assert listed.images == [status.image]
    other = pb.ImageFilter(image=pb.ImageSpec(image="other"))
    assert not (await runtime.call("ListImages", pb.ListImagesRequest(filter=other))).images
    await runtime.call("RemoveImage", pb.RemoveImageRequest(image=spec))
    assert not (await runtime.call("ListImages")).images
    assert not (await runtime.call("ImageStatus", pb.ImageStatusRequest(image=spec))).HasField("image")
    assert runtime.metrics.registry.get_sample_value("husk_image_pull_bytes_total") == 1000


async def test_image_fs_info_has_mountpoint_and_usage(runtime: Runtime) -> None:
    (usage,) = (await runtime.call("ImageFsInfo")).image_filesystems
    assert (usage.fs_id.mountpoint, usage.used_bytes.value) == ("/var/lib/husk/images", 4096)
    assert usage.timestamp > 0


async def test_pull_continues_after_its_deadline_and_a_retry_joins_it(runtime: Runtime) -> None:
    runtime.images.gate = asyncio.Event()
    request = pb.PullImageRequest(image=pb.ImageSpec(image="a"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await runtime.call("PullImage", request, timeout_s=0.2)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    retry = await runtime.retried("PullImage", request)
    runtime.images.gate.set()
    assert (await retry).image_ref
    assert (len(runtime.images.pulls), runtime.images.cancelled) == (1, 0)


async def test_unreachable_registry_begins_with_the_name_that_kubelets_parse(runtime: Runtime) -> None:
    runtime.images.failure = RegistryUnavailable("example.test", "GET manifest", "connection refused")
    code, details = await runtime.refused("PullImage", pb.PullImageRequest(image=pb.ImageSpec(image="a")))
    assert code is Code.UNAVAILABLE
    assert details.startswith("RegistryUnavailable")


async def test_image_with_unknown_runtime_handler_is_refused(runtime: Runtime) -> None:
    spec = pb.ImageSpec(image="a", runtime_handler="huge")
    code, details = await runtime.refused("PullImage", pb.PullImageRequest(image=spec))
    assert (code, details) == (
        Code.INVALID_ARGUMENT,
        "image.runtime_handler: 'huge' is not configured; accepted: '', 'small'",
    )


async def test_progress_is_streamed_before_the_result(runtime: Runtime) -> None:
    pulled = [one async for one in runtime.call("Pull", husk.PullRequest(image="a"))]
    assert [(one.step, one.current, one.total) for one in pulled[:-1]] == [("download", 1000, 1000)]
    assert list(pulled[-1].done.names) == ["example.test/a:latest"]
    imported = [one async for one in runtime.call("Import", husk.ImportRequest(path="/x/b.tar"))]
    assert list(imported[-1].done.names) == ["example.test/b:latest"]


async def test_streamed_pull_is_cancelled_with_its_client(runtime: Runtime) -> None:
    runtime.images.gate = asyncio.Event()
    call = runtime.call("Pull", husk.PullRequest(image="a"))
    assert (await call.read()).current == 600
    call.cancel()
    await eventually(lambda: runtime.images.cancelled == 1)


async def test_failed_pull_ends_the_stream_with_its_error(runtime: Runtime) -> None:
    runtime.images.failure = RegistryUnavailable("example.test", "GET manifest", "refused")
    call = runtime.call("Pull", husk.PullRequest(image="a"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [one async for one in call]
    assert caught.value.code() is Code.UNAVAILABLE
