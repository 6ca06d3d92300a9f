"""All live pods and containers, found by id or by an unambiguous beginning of one, and their names.

A name is taken while its object exists: a pod's is (name, namespace, uid, attempt), a container's
is (name, attempt) within its pod (CRI: "the name must be unique in the sandbox").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from sandbox.container import Container
from sandbox.errors import InvalidSpec, NotFound, Reserved
from sandbox.pod import Pod
from sandbox.spec import ContainerId, ContainerSpec, PodId, PodSpec

T = TypeVar("T")


class Registry:
    def __init__(self) -> None:
        self.pods: dict[PodId, Pod] = {}
        self.containers: dict[ContainerId, Container] = {}
        self.starting: set[str] = set()  # names of pods that have no id yet

    def pod(self, id: str) -> Pod:
        """Raises NotFound, InvalidSpec when `id` begins several ids."""
        return _find("sandbox", id, self.pods)

    def container(self, id: str) -> Container:
        """Raises NotFound, InvalidSpec when `id` begins several ids."""
        return _find("container", id, self.containers)

    def containers_of(self, pod: Pod) -> Iterator[Container]:
        return (container for container in list(self.containers.values()) if container.pod is pod)

    def check_pod_name(self, spec: PodSpec) -> None:
        """Raises Reserved with the pod that has the name."""
        if pod_name(spec) in self.starting:
            raise Reserved(pod_name(spec), "a sandbox that is being started")
        for pod in self.pods.values():
            if pod_name(pod.record.spec) == pod_name(spec):
                raise Reserved(pod_name(spec), f"sandbox {pod.id}")

    def check_container_name(self, pod: Pod, spec: ContainerSpec) -> None:
        for container in self.containers_of(pod):
            if container_name(container.record.spec) == container_name(spec):
                raise Reserved(container_name(spec), f"container {container.id}")


def pod_name(spec: PodSpec) -> str:
    return f"{spec.name}_{spec.namespace}_{spec.uid}_{spec.attempt}"


def container_name(spec: ContainerSpec) -> str:
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
        raise InvalidSpec(f"{kind} id", f"{id!r} begins {len(found)} ids", "a longer id")
    return items[found[0]]
