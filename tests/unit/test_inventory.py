"""Pods and containers are found by id or prefix, names are reserved, and observers hear of every change."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sandbox.container import Container
from sandbox.errors import InvalidSpec, NotFound, Reserved
from sandbox.inventory import Inventory
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, ContainerState, PodRecord, PodState
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, PodId, PodSpec
from tests.fakes.inventory import make_inventory


@dataclass
class Log:
    """An observer that keeps what it hears."""

    heard: list[str] = field(default_factory=list)

    def pod_changed(self, pod: Pod) -> None:
        self.heard.append(f"{pod.id} {pod.record.state}")

    def pod_deleted(self, pod: Pod) -> None:
        self.heard.append(f"{pod.id} deleted")

    def container_changed(self, container: Container) -> None:
        self.heard.append(f"{container.id} {container.record.state}")

    def container_deleted(self, container: Container) -> None:
        self.heard.append(f"{container.id} deleted")


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    return make_inventory(tmp_path)


def add_pod(inventory: Inventory, id: str, name: str = "web") -> Pod:
    spec = PodSpec(name=name, namespace="default", uid="u")
    pod = inventory.make_pod(PodRecord(id=PodId(id), spec=spec, created_at_ns=1))
    inventory.add_pod(pod)
    return pod


def add_container(inventory: Inventory, pod: Pod, id: str, name: str = "main") -> Container:
    record = ContainerRecord(
        id=ContainerId(id),
        pod_id=pod.id,
        spec=ContainerSpec(name=name, image="i"),
        created_at_ns=1,
        image_id="i",
        image_ref="i",
        defaults=ImageDefaults(),
        chain_ids=(f"sha256:{id}",),
    )
    container = inventory.make_container(record, pod)
    inventory.add_container(container)
    return container


def test_pod_is_found_by_id_and_by_unambiguous_prefix(inventory: Inventory) -> None:
    one, two = add_pod(inventory, "abc1"), add_pod(inventory, "abd2", "other")
    add_pod(inventory, "abc", "short")
    assert inventory.pod("abc1") is one and inventory.pod("abd") is two
    assert inventory.pod("abc").id == "abc", "a whole id wins over prefixes"
    with pytest.raises(InvalidSpec, match="'ab' is a prefix of 3 ids"):
        inventory.pod("ab")
    for unknown in ("", "x", "abc12"):
        with pytest.raises(NotFound):
            inventory.pod(unknown)


def test_pod_that_was_not_added_is_not_found(inventory: Inventory) -> None:
    inventory.make_pod(
        PodRecord(id=PodId("p"), spec=PodSpec(name="n", namespace="", uid=""), created_at_ns=1)
    )
    with pytest.raises(NotFound):
        inventory.pod("p")


def test_names_are_reserved_while_their_objects_exist(inventory: Inventory) -> None:
    pod, other = add_pod(inventory, "p"), add_pod(inventory, "q", "other")
    container = add_container(inventory, pod, "c")
    with pytest.raises(Reserved, match=r"web_default_u_0.*sandbox p"):
        inventory.check_pod_name(pod.record.spec)
    with pytest.raises(Reserved, match=r"main_0.*container c"):
        inventory.check_container_name(pod, container.record.spec)
    inventory.check_container_name(other, container.record.spec)
    inventory.forget_container(container)
    inventory.check_container_name(pod, container.record.spec)
    inventory.forget_pod(pod)
    inventory.check_pod_name(pod.record.spec)


def test_observers_hear_changes_of_state_alone_and_deletions(inventory: Inventory) -> None:
    log = Log()
    inventory.observe(log)
    pod = add_pod(inventory, "p")
    container = add_container(inventory, pod, "c")
    pod.update(problem="none")
    pod.update(state=PodState.READY)
    pod.update(state=PodState.READY)
    container.update(state=ContainerState.CREATED)
    inventory.forget_container(container)
    inventory.forget_pod(pod)
    assert log.heard == ["p ready", "c created", "c deleted", "p deleted"]
    assert not inventory.pods and not inventory.containers
    assert list(inventory.pod_store.directory.iterdir()) == []


def test_layers_in_use_are_unknown_while_a_container_record_is_quarantined(inventory: Inventory) -> None:
    pod = add_pod(inventory, "p")
    for id in ("a", "b"):
        add_container(inventory, pod, id).update()
    assert inventory.layers_in_use() == frozenset({"sha256:a", "sha256:b"})
    inventory.container_store.set_aside("b", "broken")
    assert inventory.layers_in_use() is None
    inventory.container_store.drop("b")
    assert inventory.layers_in_use() == frozenset({"sha256:a"})
