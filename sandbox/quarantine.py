"""Objects whose records cannot be trusted: they are shown, left alone, and removed on request.

A record is quarantined when its file cannot be read or understood, was written by a newer Husk, or names
another id or unknown steps, and when it is missing though something shows that its object exists:

    pod          its run directory, RUN/pods/ID, or the record of one of its containers
    container    its mount point in a pod's share, RUN/pods/ID/back/rootfs/CONTAINER

Nothing that belongs to a quarantined id is released by itself: a record that is lost or broken says nothing
about the VM, mounts, network and layers that it described. In its place stands a record that holds little
more than the id. It is never written to disk. Through it a client sees the pod as NOT_READY and the
container as UNKNOWN, with the reason, and StopPodSandbox and RemovePodSandbox release what the id holds:
all names on the host derive from it, so each step's `down` works without the record. Removal deletes the
file too. Repairing the file and restarting the daemon ends the quarantine as well.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import msgspec

from sandbox.container import Container
from sandbox.engine import Engines
from sandbox.inventory import Inventory
from sandbox.lifecycle import step_names
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, ContainerState, PodRecord, PodState, ProcessRuntime, VmRuntime
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, Isolation, PodId, PodSpec
from sandbox.store import Unwritten

log = logging.getLogger(__name__)

NAMESPACE = "husk-quarantine"  # of pods whose own namespace is not known
RUNTIMES: Mapping[Isolation, VmRuntime | ProcessRuntime] = {
    Isolation.VM: VmRuntime(),
    Isolation.PROCESS: ProcessRuntime(),
}
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


class Quarantine:
    """Finds what must be left alone, once, before anything is recovered or released."""

    def __init__(self, inventory: Inventory, engines: Engines) -> None:
        self._inventory = inventory
        self._engines = engines

    def load(self) -> None:
        """Put every pod and container into the inventory, with objects that stand in for those of
        quarantined records, and log each of these. Blocking; raises OSError if a directory of run
        directories cannot be listed."""
        inventory = self._inventory
        mounted = self._mounted_containers()
        self._check_steps()
        self._find_missing(mounted)
        for pod_record in inventory.pod_store:
            inventory.add_pod(inventory.make_pod(pod_record))
        for id, reason in inventory.pod_store.quarantined.items():
            inventory.add_pod(self._stand_in_pod(PodId(id), reason))
        for record in inventory.container_store:
            inventory.add_container(inventory.make_container(record, inventory.pods[record.pod_id]))
        for id, reason in inventory.container_store.quarantined.items():
            pod = inventory.pods.get(mounted.get(ContainerId(id)) or self._salvaged_pod(id))
            if pod is None:  # its own stand-in, so that clients see the container and can remove it
                pod = self._stand_in_pod(PodId(id), f"it stands for container {id}, whose pod is not known")
                inventory.add_pod(pod)
            inventory.add_container(self._stand_in_container(ContainerId(id), pod, reason))
        self._log()

    # ------------------------------------------------------------------------------- finding

    def _mounted_containers(self) -> Mapping[ContainerId, PodId]:
        """Find the containers that have a mount point in a run directory, and their pods."""
        return {
            ContainerId(point.name): PodId(run_dir.name)
            for run_dir in _list(self._inventory.run_dir / "pods")
            for point in _list(run_dir / "back" / "rootfs")
            if _CONTAINER_ID.fullmatch(point.name)
        }

    def _check_steps(self) -> None:
        """Quarantine records with steps that this Husk does not have: what these hold would never be
        released."""
        inventory = self._inventory
        for pod in inventory.pod_store:
            known = step_names(self._engines.for_isolation(pod.isolation).pods.pod_steps)
            if unknown := set(pod.steps) - set(known):
                inventory.pod_store.set_aside(pod.id, _unknown_steps(unknown))
        for record in inventory.container_store:
            owner = inventory.pod_store.get(record.pod_id)
            if owner is not None:
                engine = self._engines.for_isolation(owner.isolation)
                if unknown := set(record.steps) - set(step_names(engine.containers.container_steps)):
                    inventory.container_store.set_aside(record.id, _unknown_steps(unknown))

    def _find_missing(self, mounted: Mapping[ContainerId, PodId]) -> None:
        pods, containers = self._inventory.pod_store, self._inventory.container_store
        for run_dir in _list(self._inventory.run_dir / "pods"):
            if pods.get(run_dir.name) is None and run_dir.name not in pods.quarantined:
                pods.set_aside(run_dir.name, f"it does not exist, but {run_dir} does")
        for record in containers:
            if pods.get(record.pod_id) is None and record.pod_id not in pods.quarantined:
                pods.set_aside(record.pod_id, f"it does not exist, but its container {record.id} does")
        for id, pod_id in mounted.items():
            if containers.get(id) is None and id not in containers.quarantined:
                containers.set_aside(id, f"it does not exist, but pod {pod_id} has a mount point for it")

    def _salvaged_pod(self, id: str) -> PodId:
        """Read the pod's id out of a container's record, whatever else is wrong there; else return ""."""
        with contextlib.suppress(OSError, msgspec.MsgspecError, RecursionError):
            content = self._inventory.container_store.path(id).read_bytes()
            return msgspec.json.decode(content, type=_PodOf).pod_id
        return PodId("")

    # ------------------------------------------------------------------------------- stand-ins

    def _stand_in_pod(self, id: PodId, reason: str) -> Pod:
        inventory = self._inventory
        record = PodRecord(
            id=id,
            spec=PodSpec(name=id, namespace=NAMESPACE, uid=id),
            created_at_ns=_changed_at_ns(inventory.pod_store.path(id), inventory.run_dir / "pods" / id),
            state=PodState.NOT_READY,
            problem=f"quarantined: its record cannot be used: {reason}",
        )
        return inventory.make_pod(record, Unwritten(inventory.pod_store))

    def _stand_in_container(self, id: ContainerId, pod: Pod, reason: str) -> Container:
        store = self._inventory.container_store
        at_ns = _changed_at_ns(store.path(id), pod.run_dir / "back" / "rootfs" / id)
        record = ContainerRecord(
            id=id,
            pod_id=pod.id,
            spec=ContainerSpec(name=id, image=""),
            created_at_ns=at_ns,
            started_at_ns=at_ns,  # as far as is known
            image_id="",
            image_ref="",
            defaults=ImageDefaults(),
            state=ContainerState.UNKNOWN,
            reason="Quarantined",
            message=f"its record cannot be used: {reason}",
        )
        return self._inventory.make_container(record, pod, Unwritten(store))

    def _log(self) -> None:
        for id, reason in self._inventory.pod_store.quarantined.items():
            log.error(
                "pod %s is quarantined, as its record %s cannot be used: %s. What it runs and holds is left "
                "alone. Remove it with `crictl stopp %s` and `crictl rmp %s`, or repair the record and "
                "restart husk",
                *(id, self._inventory.pod_store.path(id), reason, id, id),
            )
        for id, reason in self._inventory.container_store.quarantined.items():
            log.error(
                "container %s is quarantined, as its record %s cannot be used: %s. What it holds is left "
                "alone, and no image layer is deleted meanwhile. Remove it with `crictl rm -f %s`, or repair "
                "the record and restart husk",
                *(id, self._inventory.container_store.path(id), reason, id),
            )


class _PodOf(msgspec.Struct):
    pod_id: PodId


def _unknown_steps(names: Collection[str]) -> str:
    return f"it names steps that this Husk does not know: {', '.join(sorted(names))[:200]}"


def _list(directory: Path) -> Iterator[Path]:
    """List a directory that need not exist. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield from sorted(directory.iterdir())


def _changed_at_ns(*paths: Path) -> int:
    """Return when the first of these that exists was changed; now, if none does."""
    for path in paths:
        with contextlib.suppress(OSError):
            return path.stat().st_mtime_ns
    return time.time_ns()
