"""`husk serve`: the one place that reads the configuration and builds the long-lived objects.

Start: the ports of metrics and streaming are taken and the socket's place looked at, as whoever cannot
have them shall touch nothing. Then records are read, the pods that an earlier daemon left are taken up or
undone, what has no owner is swept; only then is the socket opened. End: calls under way get a few
seconds, streaming sessions are hung up, everything is let go of, and no pod is touched; only VMs that
waited for one are ended.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cri.config import Config
from cri.interceptor import Interceptor
from cri.node import HuskNode
from cri.observe import Metrics, MetricsServer, SandboxUsage, Sources
from cri.ports import Features
from cri.server import Server, Service
from cri.services.image_service import image_service, transfer_service
from cri.services.runtime_service import runtime_service
from cri.services.sessions import SandboxBackend
from cri.streaming.server import Settings, StreamingServer
from cri.version import version
from image.image_store import ImageStore
from image.settings import Settings as ImageSettings
from network.attach import Networks
from network.errors import NetworkError
from sandbox.containers import ContainerDeps, Containers
from sandbox.events import Events
from sandbox.guest_image.build import default_profile
from sandbox.host import cgroup
from sandbox.host.flights import Flights
from sandbox.host.limiter import Limiter
from sandbox.host.size import memory_mib, usable_cpus
from sandbox.host.tasks import Tasks
from sandbox.host_pods.engine import ProcessDeps, ProcessEngine
from sandbox.plan.vm import HostSize
from sandbox.pod import Pod
from sandbox.pods import PodDeps, Pods
from sandbox.records import ContainerRecord, PodRecord, Side
from sandbox.registry import Registry
from sandbox.spec import Isolation
from sandbox.stats.collector import StatsCollector
from sandbox.stats.host_usage import HostUsage, host_usage
from sandbox.stats.layer_usage import LayerUsage
from sandbox.steps.pod import PodSteps, pod_steps
from sandbox.store import Store
from sandbox.vm_pods.engine import VmDeps, VmEngine
from sandbox.vm_pods.pool import PoolDeps, VmPool
from sandbox.vm_pods.resize import Resizer
from sandbox.vm_pods.steps import Vm, grow
from sandbox.vm_pods.templates import Templates
from sandbox.vmm import find_hypervisor

log = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 5.0
GUEST_PHASES = frozenset({"firmware", "kernel", "mounts", "modules", "channel"})


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises MetricsNotServed, SocketTaken, OSError."""
    daemon = Daemon(config)
    await daemon.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("serving on %s", config.socket)
    await stop.wait()
    log.info("ending; pods are left as they are")
    await daemon.stop()


class Daemon:
    """Every long-lived object, made here and nowhere else."""

    def __init__(self, config: Config) -> None:
        self.config = config
        root, run_dir = Path(config.root), Path(config.run)
        self.tasks = Tasks()
        self.flights = Flights()
        self.metrics = Metrics(version())
        self.metrics_server: MetricsServer | None = None
        self.registry = Registry()
        self.pod_store = Store(root / "pods", PodRecord)
        self.container_store = Store(root / "containers", ContainerRecord)
        self.hypervisor = find_hypervisor("qemu")
        self.networks = Networks(
            conf_dir=Path(config.cni.conf_dir),
            bin_dirs=[Path(directory) for directory in config.cni.bin_dirs],
            cache_dir=root / "cni",
            netns_dir=run_dir / "netns",
        )
        self.images = ImageStore(
            root,
            ImageSettings(
                config_path=Path(config.registry.config_path),
                max_downloads=config.registry.max_concurrent_downloads,
            ),
            self._layers_in_use,
        )
        layout = cgroup.find_layout()
        self.node = HuskNode(config, self.hypervisor, layout)
        self.events = Events(self.registry)
        self.meter = StatsCollector(self.registry, LayerUsage(self.images.rootfs))
        self.containers = Containers(
            self.registry,
            ContainerDeps(
                store=self.container_store,
                plans=root / "containers",
                images=self.images,
                rootfs=self.images.rootfs,
                events=self.events,
                cdi_dirs=[Path(directory) for directory in config.cdi.spec_dirs],
                on_phase=self.metrics.phase,
            ),
        )
        self.cgroups = cgroup.Cgroups(layout=layout, root=config.cgroup_root)
        host = HostSize(memory_mib=memory_mib(), cpus=usable_cpus())
        # a VM keeps a CPU busy while it starts; of a plug-in's time the better part is waiting
        self.stages = (Limiter("vm", max(2, host.cpus)), Limiter("network", max(4, 2 * host.cpus)))
        vm = self._vm_step(host)
        steps = pod_steps(vm, self.stages[1])
        self.factory = VmPool(
            PoolDeps(
                templates=vm.templates,
                vm=vm,
                steps=steps,
                handlers=self.node.handlers,
                handler=self.node.handler,
                accelerator=self.node.verdict,
                make_pod=lambda record: self.pods.make(record),
                tasks=self.tasks,
            )
        )
        self.processes = self._process_engine()
        self.pods = Pods(
            self.registry,
            self.containers,
            PodDeps(
                store=self.pod_store,
                run=run_dir,
                engines={Isolation.VM: self._vm_engine(steps), Isolation.PROCESS: self.processes},
                handler=self.node.handler,
                on_started=self._note_start,
                events=self.events,
            ),
        )
        self.streaming = StreamingServer(
            SandboxBackend(self.pods, self.containers),
            Settings(
                address=config.streaming.address,
                port=config.streaming.port,
                idle_timeout_s=config.streaming.idle_timeout_s,
                tls_cert=config.streaming.tls_cert,
                tls_key=config.streaming.tls_key,
            ),
        )
        self.server = Server(Path(config.socket), self._services(), Interceptor(self.metrics))

    def _vm_step(self, host: HostSize) -> Vm:
        templates = Templates(
            Path(self.config.run) / "templates", self.hypervisor, self.networks, self.cgroups
        )
        return Vm(self.hypervisor, self.networks, self.cgroups, templates, self.stages[0], host)

    def _vm_engine(self, steps: PodSteps) -> VmEngine:
        return VmEngine(
            self.registry,
            self.containers,
            VmDeps(
                hypervisor=self.hypervisor,
                steps=steps,
                factory=self.factory,
                accelerator=self.node.verdict,
                make_pod=lambda record: self.pods.make(record),
                rootfs=self.images.rootfs,
                tasks=self.tasks,
                room=Resizer(self.registry, grow),
                default_profile=default_profile(Path(self.config.root)),
                usage=self._usage_of,
            ),
        )

    def _process_engine(self) -> ProcessEngine:
        return ProcessEngine(
            self.registry,
            self.containers,
            ProcessDeps(
                cgroups=cgroup.Cgroups(layout=cgroup.find_layout(whole=True), root=self.config.cgroup_root),
                networks=self.networks,
                stage=self.stages[1],
                rootfs=self.images.rootfs,
                make_pod=lambda record: self.pods.make(record),
                tasks=self.tasks,
            ),
        )

    def _services(self) -> Sequence[Service]:
        return (
            runtime_service(
                pods=self.pods,
                containers=self.containers,
                meter=self.meter,
                events=self.events,
                networks=self.networks,
                node=self.node,
                flights=self.flights,
                streaming=self.streaming,
                version=version(),
                layers_mountpoint=self.config.root,
            ),
            image_service(
                images=self.images,
                flights=self.flights,
                metrics=self.metrics,
                handlers=self.node.handlers,
            ),
            transfer_service(images=self.images, metrics=self.metrics),
        )

    # ----------------------------------------------------------------------------- start, stop

    async def start(self) -> None:
        self._take_metrics_port()
        self.server.check()
        await self.streaming.start()
        self.pod_store.load()
        self.container_store.load()
        await asyncio.to_thread(self.images.load)
        obstacle = await asyncio.to_thread(self.images.find_idmap_obstacle)
        self.node.features = Features(user_namespaces=not obstacle, user_namespace_obstacle=obstacle)
        await self.pods.adopt_all(list(self.container_store))
        await self._sweep()
        self.metrics.watch(
            Sources(
                sandboxes=self._pods_by_state,
                isolation=self._ready_by_isolation,
                containers=self._containers_by_state,
                usage=self._usage,
                stages=lambda: (*self.stages, *self.images.stages()),
            )
        )
        if self.metrics_server is not None:
            self.metrics_server.start()
        self.node.check()
        await self.server.start()
        self.tasks.spawn(self.node.warm_up(), "choice of the accelerator")
        await self.factory.start()

    def _take_metrics_port(self) -> None:
        wish = self.config.metrics
        if wish.port:
            self.metrics_server = MetricsServer(self.metrics, wish.address, wish.port)

    async def stop(self) -> None:
        self.events.close()
        await self.server.stop(SHUTDOWN_GRACE_S)
        await self.streaming.stop()
        await self.flights.close(SHUTDOWN_GRACE_S)
        await self.factory.close()
        await self.tasks.close()
        await self.meter.close()
        await self.pods.close()
        await self.images.close()
        if self.metrics_server is not None:
            self.metrics_server.close()

    async def _sweep(self) -> None:
        """Release what belongs to no record: only a lost or broken record leads to that."""
        known = {record.id for record in self.pod_store}
        try:
            await self.networks.gc(known)
        except NetworkError as error:
            log.error("networks without a pod could not all be released: %s", error)
        await self.pods.sweep(known)
        await self.containers.sweep()
        await self.images.collect()

    # -------------------------------------------------------------------------------- sources

    def _layers_in_use(self) -> frozenset[str]:
        return frozenset(chain for record in self.container_store for chain in record.layers)

    def _note_start(self, record: PodRecord) -> None:
        for phase in record.phases:
            # what a guest calls its phases must not make new series without end
            if phase.side is Side.HOST or phase.name in GUEST_PHASES:
                name = phase.name if phase.side is Side.HOST else f"guest-{phase.name}"
                self.metrics.phase(name, phase.end_s - phase.begin_s)

    def _pods_by_state(self) -> Mapping[str, int]:
        return Counter(str(record.state) for record in self.pod_store)

    def _ready_by_isolation(self) -> Mapping[str, int]:
        ready = Counter(str(record.isolation) for record in self.pod_store if record.ready)
        return {str(kind): ready[str(kind)] for kind in Isolation}

    def _containers_by_state(self) -> Mapping[str, int]:
        return Counter(str(record.state) for record in self.container_store)

    def _usage_of(self, pod: Pod) -> HostUsage:
        """Files of the host alone, so any thread may ask."""
        assert pod.record.vm is not None
        return host_usage(pod.record.vm, self.cgroups.directories(pod.id, pod.record.spec.cgroup_parent))

    def _usage(self) -> Sequence[SandboxUsage]:
        ready = [pod for pod in list(self.registry.pods.values()) if pod.record.ready]
        return [
            _sandbox_usage(pod.record, self._usage_of(pod))
            if pod.record.vm
            else _processes_usage(pod.record, *self.processes.cost(pod))
            for pod in ready
        ]


def _processes_usage(record: PodRecord, cpu_seconds: float, memory_bytes: int) -> SandboxUsage:
    return SandboxUsage(
        namespace=record.spec.namespace,
        pod=record.spec.name,
        cpu_seconds={"processes": cpu_seconds},
        memory_bytes={"processes": memory_bytes},
    )


def _sandbox_usage(record: PodRecord, usage: HostUsage) -> SandboxUsage:
    return SandboxUsage(
        namespace=record.spec.namespace,
        pod=record.spec.name,
        cpu_seconds={"vmm": usage.vmm.cpu_seconds, "virtiofsd": usage.helpers.cpu_seconds},
        memory_bytes={
            "guest": usage.guest_memory_bytes,
            "vmm": usage.vmm.own_bytes,
            "virtiofsd": usage.helpers.own_bytes,
        },
    )
