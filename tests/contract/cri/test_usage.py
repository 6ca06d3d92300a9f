"""Statistics, metrics, events and streamed lists over a real gRPC socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as pb
from cri.responses import list_cache
from sandbox.events import QUEUE_MAX, Event, EventKind, Events
from sandbox.records import PodRecord, PodState
from sandbox.spec import PodId, PodSpec, Resources
from tests.contract.cri.runtime import Runtime
from tests.fakes.inventory import make_inventory
from tests.kit.eventually import eventually

Code = grpc.StatusCode


async def messages(runtime: Runtime, name: str, request: Any = None) -> list[Any]:
    return [message async for message in runtime.call(name, request)]


# --------------------------------------------------------------------------------- statistics


async def test_container_stats_are_of_running_containers(runtime: Runtime) -> None:
    pod_id = await runtime.pod()
    running = await runtime.started(pod_id, labels={"app": "a"})
    created = await runtime.container(pod_id, labels={"app": "b"})
    answer = await runtime.call("ListContainerStats")
    assert [one.attributes.id for one in answer.stats] == [running]
    assert answer.stats[0].writable_layer.fs_id.mountpoint == "/"
    assert answer.stats[0].cpu.usage_nano_cores.value == 500
    request = pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(label_selector={"app": "b"}))
    assert not (await runtime.call("ListContainerStats", request)).stats
    one = await runtime.call("ContainerStats", pb.ContainerStatsRequest(container_id=created))
    assert one.stats.attributes.id == created
    assert not one.stats.HasField("memory")
    one = await runtime.call("ContainerStats", pb.ContainerStatsRequest(container_id=running[:13]))
    assert one.stats.memory.working_set_bytes.value == 7 << 20


async def test_pod_stats_contain_network_processes_and_containers(runtime: Runtime) -> None:
    first = await runtime.pod("first", labels={"app": "a"})
    second = await runtime.pod("second")
    container = await runtime.started(first)
    listed = (await runtime.call("ListPodSandboxStats")).stats
    assert {one.attributes.id for one in listed} == {first, second}
    request = pb.ListPodSandboxStatsRequest(filter=pb.PodSandboxStatsFilter(label_selector={"app": "a"}))
    (one,) = (await runtime.call("ListPodSandboxStats", request)).stats
    assert one.attributes.metadata.name == "first"
    assert one.linux.process.process_count.value == 2
    assert one.linux.network.default_interface.name == "eth0"
    assert [each.attributes.id for each in one.linux.containers] == [container]
    assert one.linux.containers[0].writable_layer.used_bytes.value == 4096
    same = await runtime.call("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id=first[:13]))
    assert same.stats.attributes.id == first


async def test_stats_of_a_stopped_pod_have_attributes_only(runtime: Runtime) -> None:
    pod_id = await runtime.pod()
    await runtime.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=pod_id))
    one = await runtime.call("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id=pod_id))
    assert (one.stats.attributes.id, one.stats.HasField("linux")) == (pod_id, False)
    assert not (await runtime.call("ListPodSandboxStats")).stats


async def test_pod_that_does_not_answer_is_omitted_from_lists_and_unavailable_alone(runtime: Runtime) -> None:
    silent, well = await runtime.pod("silent"), await runtime.pod("well")
    container = await runtime.started(silent)
    await runtime.started(well)
    runtime.stats.silent.add(silent)
    assert [one.attributes.id for one in (await runtime.call("ListPodSandboxStats")).stats] == [well]
    assert len((await runtime.call("ListContainerStats")).stats) == 1
    assert len((await runtime.call("ListPodSandboxMetrics")).pod_metrics) == 1
    request = pb.PodSandboxStatsRequest(pod_sandbox_id=silent)
    assert await runtime.code("PodSandboxStats", request) is Code.UNAVAILABLE
    assert await runtime.code("ContainerStats", pb.ContainerStatsRequest(container_id=container)) is (
        Code.UNAVAILABLE
    )


async def test_stats_of_an_unknown_id_are_not_found(runtime: Runtime) -> None:
    assert await runtime.code("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id="x")) is (
        Code.NOT_FOUND
    )
    assert await runtime.code("ContainerStats", pb.ContainerStatsRequest(container_id="x")) is Code.NOT_FOUND
    request = pb.ListPodSandboxStatsRequest(filter=pb.PodSandboxStatsFilter(id="x"))
    assert not (await runtime.call("ListPodSandboxStats", request)).stats


# ------------------------------------------------------------------------------------ metrics


async def test_pod_metrics_match_their_descriptors(runtime: Runtime) -> None:
    pod_id = await runtime.pod()
    container = await runtime.started(pod_id)
    keys = {one.name: one.label_keys for one in (await runtime.call("ListMetricDescriptors")).descriptors}
    (pod,) = (await runtime.call("ListPodSandboxMetrics")).pod_metrics
    assert pod.pod_sandbox_id == pod_id
    assert [one.container_id for one in pod.container_metrics] == [container]
    assert runtime.stats.files_requested
    for metric in [*pod.metrics, *pod.container_metrics[0].metrics]:
        assert len(metric.label_values) == len(keys[metric.name])
    values = {metric.name: metric.value.value for metric in pod.container_metrics[0].metrics}
    assert values["container_file_descriptors"] == 7
    assert values["container_ulimits_soft"] == 1024
    assert values["container_fs_limit_bytes"] > 0


# ------------------------------------------------------------------------------------- events


async def assert_event(runtime: Runtime, pod_id: str, id: str, kind: EventKind, at_ns: int) -> None:
    pod = runtime.pods.find(pod_id)
    containers = tuple(runtime.pods.containers_of(pod.id))
    await runtime.events.events.put(Event(kind=kind, id=id, at_ns=at_ns, pod=pod, containers=containers))


async def test_events_are_streamed_with_the_status_of_pod_and_containers(runtime: Runtime) -> None:
    pod_id = await runtime.pod()
    container = await runtime.started(pod_id)
    for at_ns, kind in enumerate(EventKind, 1):
        await assert_event(runtime, pod_id, container, kind, at_ns)
    await assert_event(runtime, pod_id, pod_id, EventKind.DELETED, 5)
    await runtime.events.events.put(None)
    seen = await messages(runtime, "GetContainerEvents")
    assert [(each.container_event_type, each.created_at) for each in seen] == [
        (pb.CONTAINER_CREATED_EVENT, 1),
        (pb.CONTAINER_STARTED_EVENT, 2),
        (pb.CONTAINER_STOPPED_EVENT, 3),
        (pb.CONTAINER_DELETED_EVENT, 4),
        (pb.CONTAINER_DELETED_EVENT, 5),
    ]
    assert {each.container_id for each in seen[:4]} == {container}
    assert seen[4].container_id == pod_id
    for each in seen:
        assert each.pod_sandbox_status.network.ip == "10.9.0.2"
        assert [one.id for one in each.containers_statuses] == [container]
        assert each.containers_statuses[0].image_ref


async def test_cancelled_subscription_is_released(runtime: Runtime) -> None:
    call = runtime.call("GetContainerEvents")
    reading = asyncio.create_task(call.read())
    await eventually(lambda: runtime.events.subscribers == 1)
    call.cancel()
    await eventually(lambda: runtime.events.subscribers == 0)
    await asyncio.gather(reading, return_exceptions=True)


async def test_slow_subscriber_gets_resource_exhausted(runtime: Runtime) -> None:
    runtime.events.behind = True
    await runtime.events.events.put(None)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await messages(runtime, "GetContainerEvents")
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    assert "subscribe again" in (caught.value.details() or "")


async def test_subscriber_that_does_not_read_is_bounded_and_ended(tmp_path: Path) -> None:
    hub = Events(make_inventory(tmp_path))
    runtime = Runtime(tmp_path / "husk.sock", events=cast(Any, hub))
    await runtime.start()
    call = runtime.call("GetContainerEvents")
    await eventually(lambda: hub._subscriptions)
    spec = PodSpec(name="n", namespace="ns", uid="u", annotations={"bulk": "x" * 4096})
    pod = SimpleNamespace(
        id="p", record=PodRecord(id=PodId("p"), spec=spec, created_at_ns=1, state=PodState.READY)
    )
    (subscription,) = hub._subscriptions
    for _ in range(4 * QUEUE_MAX):
        hub.pod_changed(cast(Any, pod))
        await asyncio.sleep(0)
    assert not subscription._queue
    assert await runtime.code("Version") is Code.OK, "the daemon goes on"
    seen = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            seen += 1
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    assert seen < 4 * QUEUE_MAX
    await eventually(lambda: not hub._subscriptions)
    await runtime.stop()


# --------------------------------------------------------------------------------- streamed lists


async def test_streamed_list_is_split_into_batches(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_cache, "BATCH_BYTES", 400)
    pods = [await runtime.pod(f"pod{n}", labels={"even": str(n % 2 == 0)}) for n in range(10)]
    containers = [await runtime.started(pod) for pod in pods]
    seen = await messages(runtime, "StreamPodSandboxes")
    assert len(seen) > 1
    assert all(message.pod_sandboxes for message in seen)
    assert [one.id for message in seen for one in message.pod_sandboxes] == pods
    even = pb.PodSandboxFilter(label_selector={"even": "True"})
    found = await messages(runtime, "StreamPodSandboxes", pb.StreamPodSandboxesRequest(filter=even))
    assert [one.id for message in found for one in message.pod_sandboxes] == pods[::2]
    seen = await messages(runtime, "StreamContainers")
    assert len(seen) > 1
    assert [one.id for message in seen for one in message.containers] == containers
    one = pb.StreamContainersRequest(filter=pb.ContainerFilter(pod_sandbox_id=pods[3]))
    (message,) = await messages(runtime, "StreamContainers", one)
    assert [each.id for each in message.containers] == [containers[3]]


async def test_streamed_list_without_items_has_no_message(runtime: Runtime) -> None:
    for name in (
        *("StreamPodSandboxes", "StreamContainers", "StreamImages"),
        *("StreamPodSandboxStats", "StreamContainerStats", "StreamPodSandboxMetrics"),
    ):
        assert await messages(runtime, name) == [], name


async def test_images_are_streamed(runtime: Runtime) -> None:
    for name in ("one", "two"):
        await runtime.call("PullImage", pb.PullImageRequest(image=pb.ImageSpec(image=name)))
    seen = await messages(runtime, "StreamImages")
    listed = (await runtime.call("ListImages")).images
    assert [one for message in seen for one in message.images] == list(listed)
    wanted = pb.ImageFilter(image=pb.ImageSpec(image="one"))
    (message,) = await messages(runtime, "StreamImages", pb.StreamImagesRequest(filter=wanted))
    assert [list(one.repo_tags) for one in message.images] == [["example.test/one:latest"]]
    unknown = pb.ImageFilter(image=pb.ImageSpec(image="unknown"))
    assert await messages(runtime, "StreamImages", pb.StreamImagesRequest(filter=unknown)) == []


async def test_usage_is_streamed_pod_by_pod(runtime: Runtime) -> None:
    pods = [await runtime.pod(f"pod{n}") for n in range(3)]
    containers = [await runtime.started(pod) for pod in pods]
    stats = await messages(runtime, "StreamPodSandboxStats")
    assert [[one.attributes.id for one in message.pod_sandbox_stats] for message in stats] == (
        [[pod] for pod in pods]
    )
    stats = await messages(runtime, "StreamContainerStats")
    listed = [one.attributes.id for message in stats for one in message.container_stats]
    assert sorted(listed) == sorted(containers)
    metrics = await messages(runtime, "StreamPodSandboxMetrics")
    assert [one.pod_sandbox_id for message in metrics for one in message.pod_sandbox_metrics] == pods


# ------------------------------------------------------------------------------------- limits


async def test_update_of_pod_resources_is_applied(runtime: Runtime) -> None:
    pod_id = await runtime.pod()
    request = pb.UpdatePodSandboxResourcesRequest(
        pod_sandbox_id=pod_id[:13],
        resources=pb.LinuxContainerResources(memory_limit_in_bytes=1 << 28),
        overhead=pb.LinuxContainerResources(cpu_quota=5000),
    )
    await runtime.call("UpdatePodSandboxResources", request)
    record = runtime.pods.find(pod_id)
    assert record.resources == Resources(memory_limit=1 << 28)
    assert record.overhead == Resources(cpu_quota=5000)


@pytest.mark.parametrize("field", ["resources", "overhead"])
async def test_invalid_pod_resources_are_named_by_their_path(runtime: Runtime, field: str) -> None:
    request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=await runtime.pod())
    getattr(request, field).cpu_shares = -1
    code, message = await runtime.refused("UpdatePodSandboxResources", request)
    assert (code, f"{field}.cpu_shares" in message) == (Code.INVALID_ARGUMENT, True)
    assert await runtime.code("UpdatePodSandboxResources") is Code.NOT_FOUND
