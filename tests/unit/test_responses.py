"""Records as messages, filters, and lists encoded once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cri.proto import runtime_v1_pb2 as pb
from cri.responses import objects
from cri.responses.list_cache import ListCache
from network.attach import Attachment
from sandbox.records import ContainerRecord, ContainerState, ContainerUser, PodRecord, PodState
from sandbox.spec import (
    ContainerId,
    ContainerSpec,
    ImageDefaults,
    MountSpec,
    PidMode,
    PodId,
    PodSpec,
    Propagation,
    Resources,
)

replace = msgspec.structs.replace


def pod(id: str = "a" * 64, **changes: Any) -> PodRecord:
    spec = PodSpec(
        name="web",
        namespace="default",
        uid="u",
        attempt=2,
        handler="small",
        labels={"app": "web", "tier": "front"},
        annotations={"note": "x"},
        pid_mode=PidMode.CONTAINER,
    )
    record = PodRecord(id=PodId(id), spec=spec, created_at_ns=11, state=PodState.READY)
    return replace(record, **changes)


def container(id: str = "c" * 64, **changes: Any) -> ContainerRecord:
    spec = ContainerSpec(
        name="nginx",
        image="docker.io/nginx:1",
        user_specified_image="nginx",
        labels={"app": "web"},
        mounts=(MountSpec(container_path="/c", host_path="/h", propagation=Propagation.HOST_TO_CONTAINER),),
    )
    record = ContainerRecord(
        id=ContainerId(id),
        pod_id=PodId("a" * 64),
        spec=spec,
        created_at_ns=5,
        image_id="sha256:1",
        image_ref="sha256:1",
        defaults=ImageDefaults(),
        state=ContainerState.CREATED,
    )
    return replace(record, **changes)


def test_pod_status_after_stop_has_its_addresses() -> None:
    network = Attachment(netns="/n", ips=("10.0.0.5", "fd00::5"))
    status = objects.pod_status(pod(network=network, state=PodState.NOT_READY))
    assert status.state == pb.SANDBOX_NOTREADY
    assert (status.network.ip, [ip.ip for ip in status.network.additional_ips]) == ("10.0.0.5", ["fd00::5"])
    assert (status.metadata.attempt, status.runtime_handler, status.created_at) == (2, "small", 11)
    assert status.linux.namespaces.options.pid == pb.CONTAINER
    assert dict(status.labels) == {"app": "web", "tier": "front"}


def test_container_status_after_kill_has_exit_code_and_reason() -> None:
    record = container(
        state=ContainerState.EXITED,
        exit_code=137,
        reason="OOMKilled",
        started_at_ns=6,
        finished_at_ns=7,
        user=ContainerUser(uid=1, gid=2, groups=(2, 3)),
        resources=Resources(cpu_shares=512, hugepage_limits={"2MB": 4}, unified={"memory.high": "9"}),
        stop_signal="SIGRTMIN+3",
        log_path="/var/log/x/0.log",
    )
    status = objects.container_status(record)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 137, "OOMKilled")
    assert (status.started_at, status.finished_at) == (6, 7)
    assert (status.image.image, status.image.user_specified_image) == ("docker.io/nginx:1", "nginx")
    assert (status.image_ref, status.image_id) == ("sha256:1", "sha256:1")
    assert (status.user.linux.uid, list(status.user.linux.supplemental_groups)) == (1, [2, 3])
    assert status.resources.linux.cpu_shares == 512
    assert status.resources.linux.hugepage_limits[0].limit == 4
    assert status.mounts[0].propagation == pb.PROPAGATION_HOST_TO_CONTAINER
    assert (status.stop_signal, status.log_path) == (pb.SIGNAL_SIGRTMINPLUS3, "/var/log/x/0.log")


def test_container_state_is_converted_for_every_state() -> None:
    numbers = {state: objects.container_state(container(state=state)) for state in ContainerState}
    assert sorted(set(numbers.values())) == [0, 1, 2, 3]


@pytest.mark.parametrize("signal", [name for name, number in pb.Signal.items() if number])
def test_stop_signal_round_trips_for_every_signal(signal: str) -> None:
    name = signal.removeprefix("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-")
    assert pb.Signal.Name(objects.stop_signal(name)) == signal


def test_stop_signal_without_a_number_is_the_default() -> None:
    assert objects.stop_signal("15") == pb.SIGNAL_RUNTIME_DEFAULT


def test_filter_requires_every_condition() -> None:
    one, two = pod("a1" + "0" * 62), pod("a2" + "0" * 62, state=PodState.NOT_READY)

    def found(**filter: Any) -> list[str]:
        return [record.id[:2] for record in objects.matching_pods([one, two], pb.PodSandboxFilter(**filter))]

    assert found() == ["a1", "a2"]
    assert found(id="a") == ["a1", "a2"]
    assert found(id="a2") == ["a2"]
    assert found(id="b") == []
    assert found(state=pb.PodSandboxStateValue(state=pb.SANDBOX_READY)) == ["a1"]
    assert found(label_selector={"app": "web", "tier": "front"}) == ["a1", "a2"]
    assert found(label_selector={"app": "web", "tier": "back"}) == []
    assert found(id="a2", state=pb.PodSandboxStateValue(state=pb.SANDBOX_READY)) == []


def test_container_filter_matches_a_prefix_of_the_pod_id() -> None:
    records = [container("c1"), container("c2", pod_id=PodId("b" * 64), state=ContainerState.RUNNING)]

    def found(**filter: Any) -> list[str]:
        return [one.id for one in objects.matching_containers(records, pb.ContainerFilter(**filter))]

    assert found(pod_sandbox_id="bbb") == ["c2"]
    assert found(state=pb.ContainerStateValue(state=pb.CONTAINER_CREATED)) == ["c1"]
    assert found(label_selector={"app": "db"}) == []


def test_encoded_list_parses_as_the_message() -> None:
    records = [
        container(str(n) * 64, spec=replace(container().spec, annotations={"k": "v" * 300})) for n in range(3)
    ]
    encoded = ListCache[ContainerRecord](lambda record: record.id, objects.container_item)
    expected = pb.ListContainersResponse(containers=[objects.container_item(record) for record in records])
    assert pb.ListContainersResponse.FromString(encoded.of(records)) == expected
    assert encoded.of([]) == b""


def test_encoded_list_follows_changes_and_drops_removed_items() -> None:
    made: list[str] = []

    def encode(record: PodRecord) -> pb.PodSandbox:
        made.append(record.id)
        return objects.pod_item(record)

    encoded = ListCache[PodRecord](lambda record: record.id, encode)
    one, two = pod("1" * 64), pod("2" * 64)
    encoded.of([one, two])
    encoded.of([one, two])
    assert made == [one.id, two.id]
    ended = replace(one, state=PodState.NOT_READY)
    answer = pb.ListPodSandboxResponse.FromString(encoded.of([ended]))
    assert [item.state for item in answer.items] == [pb.SANDBOX_NOTREADY]
    encoded.keep_only([two])
    encoded.of([ended])
    assert made == [one.id, two.id, one.id, one.id]
