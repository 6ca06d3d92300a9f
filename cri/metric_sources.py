"""What a scrape of /metrics reads from the daemon: states of records, and what each pod costs the host.

A scrape calls these from its own thread, so they read copies of the records and files of the host,
and never wait for the event loop or a guest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cri.metrics import LimiterCount, Metrics, SandboxUsage, Sources
from sandbox.inventory import Inventory
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, PodRecord, Side
from sandbox.spec import Isolation
from sandbox.stats.host_usage import HostUsage
from sandbox.store import Store
from sandbox.vmm import EMULATION

# Phases that the guest reports and that get a series each. A guest chooses its phase names, so any other
# name is dropped: it could make series without bound.
GUEST_PHASES = frozenset({"firmware", "kernel", "mounts", "modules", "channel"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSources:
    """Reads the daemon's records and the host's files for `Metrics`."""

    inventory: Inventory
    pods: Store[PodRecord]
    containers: Store[ContainerRecord]
    images_set_aside: Callable[[], int]
    vm_usage: Callable[[Pod], HostUsage]
    process_usage: Callable[[Pod], tuple[float, int]]  # CPU seconds and bytes of memory
    limiters: Callable[[], Sequence[LimiterCount]]

    def sources(self) -> Sources:
        """Return the functions that each scrape calls."""
        return Sources(
            sandboxes=self._pods_by_state,
            isolation=self._ready_by_isolation,
            emulated=self._ready_and_emulated,
            containers=self._containers_by_state,
            quarantined=self._quarantined,
            usage=self._usage,
            limiters=self.limiters,
        )

    def _pods_by_state(self) -> Mapping[str, int]:
        return Counter(str(record.state) for record in self.pods)

    def _ready_by_isolation(self) -> Mapping[str, int]:
        ready = Counter(str(record.isolation) for record in self.pods if record.ready)
        return {str(kind): ready[str(kind)] for kind in Isolation}

    def _ready_and_emulated(self) -> int:
        handles = [record.vm_handle for record in self.pods if record.ready]
        return sum(handle is not None and handle.spec.accelerator == EMULATION for handle in handles)

    def _containers_by_state(self) -> Mapping[str, int]:
        return Counter(str(record.state) for record in self.containers)

    def _quarantined(self) -> Mapping[str, int]:
        kept = {store.kind: len(store.quarantined) for store in (self.pods, self.containers)}
        return {**kept, "image": self.images_set_aside()}

    def _usage(self) -> Sequence[SandboxUsage]:
        ready = [pod for pod in list(self.inventory.pods.values()) if pod.record.ready]
        return [self._usage_of(pod) for pod in ready]

    def _usage_of(self, pod: Pod) -> SandboxUsage:
        if pod.record.vm_handle is None:
            cpu_seconds, memory_bytes = self.process_usage(pod)
            return _usage(pod, {"processes": cpu_seconds}, {"processes": memory_bytes})
        usage = self.vm_usage(pod)
        memory = {
            "guest": usage.guest_memory_bytes,
            "vmm": usage.vmm.own_bytes,
            "virtiofsd": usage.helpers.own_bytes,
        }
        return _usage(pod, {"vmm": usage.vmm.cpu_seconds, "virtiofsd": usage.helpers.cpu_seconds}, memory)


def record_start(metrics: Metrics, record: PodRecord) -> None:
    """Count the phases of a pod's start; those of the guest under "guest-NAME"."""
    for phase in record.phases:
        if phase.side is Side.HOST or phase.name in GUEST_PHASES:
            name = phase.name if phase.side is Side.HOST else f"guest-{phase.name}"
            metrics.phase(name, phase.end_s - phase.begin_s)


def _usage(pod: Pod, cpu_seconds: Mapping[str, float], memory_bytes: Mapping[str, int]) -> SandboxUsage:
    spec = pod.record.spec
    return SandboxUsage(
        namespace=spec.namespace, pod=spec.name, cpu_seconds=cpu_seconds, memory_bytes=memory_bytes
    )
