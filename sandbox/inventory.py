"""All pods and containers in memory, found by id or by an unambiguous prefix of one, and their names.

Objects are made here out of records, added once clients may see them, and forgotten with their records.
Observers hear of every change of state. A name is reserved while its object exists: a pod's is (name,
namespace, uid, attempt), a container's is (name, attempt) within its pod (CRI: "the name must be unique
in the sandbox").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from sandbox.container import Container
from sandbox.errors import InvalidSpec, NotFound, Reserved
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, PodRecord
from sandbox.spec import ContainerId, ContainerSpec, PodId, PodSpec
from sandbox.store import Store

T = TypeVar("T")


class Observer(Protocol):
    """Is called on the event loop, right after a change; must not raise or block."""

    def pod_changed(self, pod: Pod) -> None:
        """The pod's state differs from before."""

    def pod_deleted(self, pod: Pod) -> None:
        """The pod was removed from the inventory."""

    def container_changed(self, container: Container) -> None:
        """The container's state differs from before."""

    def container_deleted(self, container: Container) -> None:
        """The container was removed from the inventory."""


class Inventory:
    """Belongs to one event loop. `run_dir` holds the pods' run directories, RUN/pods/ID."""

    def __init__(
        self, pod_store: Store[PodRecord], container_store: Store[ContainerRecord], run_dir: Path
    ) -> None:
        self.pod_store = pod_store
        self.container_store = container_store
        self.run_dir = run_dir
        self.pods: dict[PodId, Pod] = {}
        self.containers: dict[ContainerId, Container] = {}
        self.starting: set[str] = set()  # names of pods that have no id yet
        self.on_phase: Callable[[str, float], None] = lambda name, seconds: None  # of every container
        self._observers: list[Observer] = []

    def observe(self, observer: Observer) -> None:
        """Report every later change of state to `observer`, also of objects that exist already."""
        self._observers.append(observer)

    # ------------------------------------------------------------------------------- finding

    def pod(self, id: str) -> Pod:
        """Find a pod by its id or a prefix. Raises NotFound, and InvalidSpec for an ambiguous prefix."""
        return _find("sandbox", id, self.pods)

    def container(self, id: str) -> Container:
        """Find a container by its id or a prefix. Raises as `pod` does."""
        return _find("container", id, self.containers)

    def containers_of(self, pod: Pod) -> Iterator[Container]:
        """Iterate over the pod's containers as they are now; the inventory may change meanwhile."""
        return (container for container in list(self.containers.values()) if container.pod is pod)

    def check_pod_name(self, spec: PodSpec) -> None:
        """Raise Reserved, naming the owner, if another pod has this name."""
        if pod_name(spec) in self.starting:
            raise Reserved(pod_name(spec), "a sandbox that is being started")
        for pod in self.pods.values():
            if pod_name(pod.record.spec) == pod_name(spec):
                raise Reserved(pod_name(spec), f"sandbox {pod.id}")

    def check_container_name(self, pod: Pod, spec: ContainerSpec) -> None:
        """Raise Reserved, naming the owner, if another container of the pod has this name."""
        for container in self.containers_of(pod):
            if container_name(container.record.spec) == container_name(spec):
                raise Reserved(container_name(spec), f"container {container.id}")

    def layers_in_use(self) -> frozenset[str] | None:
        """Return the chain ids of all layers that containers use; None while that is not known, as the record
        of a container is quarantined."""
        if self.container_store.quarantined:
            return None
        return frozenset(chain for record in self.container_store for chain in record.layers)

    # ------------------------------------------------------------------------------- objects

    def make_pod(self, record: PodRecord, store: Store[PodRecord] | None = None) -> Pod:
        """Make the object of a record, which is kept in `store`, by default the usual one. The object is not
        found by id before `add_pod`."""
        pod = Pod(record, self.pod_store if store is None else store, self.run_dir / "pods" / record.id)
        pod.on_state = self._pod_changed
        return pod

    def add_pod(self, pod: Pod) -> None:
        """Let the pod be found. Idempotent."""
        self.pods[pod.id] = pod

    def forget_pod(self, pod: Pod) -> None:
        """Delete the pod's record and stop finding it. Idempotent. Raises OSError."""
        pod.forget()
        self.pods.pop(pod.id, None)
        for observer in self._observers:
            observer.pod_deleted(pod)

    def make_container(
        self, record: ContainerRecord, pod: Pod, store: Store[ContainerRecord] | None = None
    ) -> Container:
        """Make the object of a record, as `make_pod` does."""
        container = Container(record, self.container_store if store is None else store, pod)
        container.on_state = self._container_changed
        container.on_phase = self.on_phase
        return container

    def add_container(self, container: Container) -> None:
        """Let the container be found. Idempotent."""
        self.containers[container.id] = container

    def forget_container(self, container: Container) -> None:
        """Delete the container's record and stop finding it. Idempotent. Raises OSError."""
        container.forget()
        self.containers.pop(container.id, None)
        for observer in self._observers:
            observer.container_deleted(container)

    def _pod_changed(self, pod: Pod) -> None:
        for observer in self._observers:
            observer.pod_changed(pod)

    def _container_changed(self, container: Container) -> None:
        for observer in self._observers:
            observer.container_changed(container)


def pod_name(spec: PodSpec) -> str:
    """Return the name that is unique among pods: NAME_NAMESPACE_UID_ATTEMPT."""
    return f"{spec.name}_{spec.namespace}_{spec.uid}_{spec.attempt}"


def container_name(spec: ContainerSpec) -> str:
    """Return the name that is unique among the containers of a pod: NAME_ATTEMPT."""
    return f"{spec.name}_{spec.attempt}"


def _find(kind: str, id: str, among: Mapping[PodId, T] | Mapping[ContainerId, T]) -> T:
    if not id:
        raise NotFound(kind, id)
    items: Mapping[str, T] = among  # type: ignore[assignment]
    exact = items.get(id)
    if exact is not None:
        return exact
    found = [key for key in items if key.startswith(id)]
    if not found:
        raise NotFound(kind, id)
    if len(found) > 1:
        raise InvalidSpec(f"{kind} id", f"{id!r} is a prefix of {len(found)} ids", "a longer id")
    return items[found[0]]
