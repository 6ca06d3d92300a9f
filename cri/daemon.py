"""`husk serve`: reads the configuration and builds the long-lived objects; nothing else does either.

`build` is the composition root of the daemon and of the tests that run it against fakes: a test passes
`Overrides` and gets the same objects, wired in the same way.

Start: the daemon binds the ports of metrics and streaming and checks that its socket is free, so that a
daemon that cannot serve changes nothing. Then it reads the records, recovers or undoes the pods that the
previous daemon left, and releases resources without a record; only then does it open the socket. Stop:
running calls get SHUTDOWN_GRACE_S, streaming sessions are closed, and every pod keeps running; only the
pooled VMs are destroyed.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cri.config import Config
from cri.interceptor import Interceptor
from cri.metric_sources import MetricSources, record_start
from cri.metrics import Metrics
from cri.metrics_server import MetricsServer
from cri.node import HuskNode
from cri.ports import Features
from cri.server import Server, Service
from cri.services.image_service import image_service, transfer_service
from cri.services.runtime_service import runtime_service
from cri.services.sessions import SandboxBackend
from cri.streaming.server import StreamingOptions, StreamingServer
from cri.version import version
from image.errors import ImageError
from image.image_store import ImageStore
from image.index import Image
from image.options import ImageOptions
from image.preload import Preloader
from image.registry import Timing
from image.stores import RootfsStore
from network.attach import Networks
from network.errors import NetworkError
from sandbox.containers import ContainerDeps, Containers
from sandbox.engine import Engine, Engines
from sandbox.events import Events
from sandbox.exits import Exits
from sandbox.host import cgroup
from sandbox.host.flights import Flights
from sandbox.host.limiter import Limiter
from sandbox.host.size import memory_mib, usable_cpus
from sandbox.host.tasks import Tasks
from sandbox.host_pods import engine as host_pods
from sandbox.host_pods.control import ProcessControl
from sandbox.host_pods.engine import ProcessDeps
from sandbox.inventory import Inventory
from sandbox.plan.vm import HostSize
from sandbox.pod import Pod
from sandbox.pods import PodDeps, Pods
from sandbox.records import ContainerRecord, PodRecord
from sandbox.spec import Handler, Isolation, VmSize
from sandbox.stats.collector import StatsCollector
from sandbox.stats.host_usage import HostUsage, host_usage
from sandbox.stats.layer_usage import LayerUsage
from sandbox.steps.pod import make_private
from sandbox.store import Store
from sandbox.vm_pods import engine as vm_pods
from sandbox.vm_pods.accelerator import AcceleratorChoice
from sandbox.vm_pods.boot_image import default_profile
from sandbox.vm_pods.engine import VmDeps
from sandbox.vm_pods.pool import PoolDeps, VmPool
from sandbox.vm_pods.resize import Resizer
from sandbox.vm_pods.steps import Vm, pod_steps
from sandbox.vm_pods.templates import Templates
from sandbox.vmm import Hypervisor
from sandbox.vmm.drivers import Hypervisors

log = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 5.0
PROBE_PAUSE_S = 60.0  # after a probe of the filesystem that a full disk did not allow


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What `build` uses in place of the objects that it would make from the configuration.

    None means the real one. `Daemon.stop` closes what was passed in as it closes what `build` made.
    """

    hypervisor: Hypervisor | None = None
    choose_accelerator: Callable[[Handler], Awaitable[AcceleratorChoice]] | None = None
    handlers: Mapping[str, Handler] | None = None  # by name; "" is the default
    networks: Networks | None = None
    images: ImageStore | None = None
    find_image: Callable[[str], Image] | None = None  # for containers; raises ImageNotFound
    rootfs: RootfsStore | None = None
    vm_cgroups: cgroup.Cgroups | None = None
    process_cgroups: cgroup.Cgroups | None = None
    host_size: HostSize | None = None
    grow_vm: Callable[[Pod, VmSize], Awaitable[None]] | None = None
    vm_usage: Callable[[Pod], HostUsage] | None = None


@dataclass(kw_only=True)
class Daemon:
    """Every long-lived object of the daemon, and the order in which they start and stop."""

    config: Config
    tasks: Tasks
    flights: Flights
    metrics: Metrics
    metrics_server: MetricsServer | None = None
    inventory: Inventory
    pod_store: Store[PodRecord]
    container_store: Store[ContainerRecord]
    hypervisor: Hypervisor
    networks: Networks
    images: ImageStore
    preloader: Preloader
    node: HuskNode
    events: Events
    stats: StatsCollector
    containers: Containers
    pods: Pods
    pool: VmPool
    engines: Engines
    metric_sources: MetricSources
    streaming: StreamingServer
    server: Server

    async def start(self) -> None:
        """Recover what the previous daemon left, then serve.

        Raises MetricsNotServed, StreamingNotServed, SocketTaken, OSError.
        """
        self._bind_metrics()
        self.server.check()
        await self.streaming.start()
        self.load()
        await asyncio.to_thread(self.images.load)
        if not await self._find_features():
            self.tasks.spawn(self._find_features_later(), "probe of idmapped mounts")
        await self.recover()
        await self._release_orphans()
        self.metrics.watch(self.metric_sources.sources())
        if self.metrics_server is not None:
            self.metrics_server.start()
        self.node.check()
        await self.server.start()
        self.tasks.spawn(self.node.warm_up(), "choice of the accelerator")
        self.tasks.spawn(self.preloader.run(), "preload of images")
        await self.pool.start()

    async def _find_features(self) -> bool:
        """Learn what the filesystem of images can do; return whether that is known: it needs some space."""
        try:
            obstacle = await asyncio.to_thread(self.images.find_idmap_obstacle)
        except (ImageError, OSError) as error:
            obstacle = f"idmapped mounts could not be probed: {error}"
            log.warning("%s; no pod can have a user namespace until that works", obstacle)
            known = False
        else:
            known = True
        self.node.features = Features(user_namespaces=not obstacle, user_namespace_obstacle=obstacle)
        return known

    async def _find_features_later(self) -> None:
        while True:
            await asyncio.sleep(PROBE_PAUSE_S)
            if await self._find_features():
                return

    def load(self) -> None:
        """Read the records of pods and containers; close the pods' directories to other users, which an
        earlier release left open. Blocking; once, before anything uses them."""
        make_private(self.inventory.run_dir / "pods")
        self.pod_store.load()
        self.container_store.load()

    async def recover(self) -> None:
        """Reattach to the pods whose records were loaded, or undo those that were half made."""
        await self.pods.recover()
        self.node.quarantined = {
            "image": self.images.index.set_aside,
            **{store.kind: store.quarantined for store in (self.pod_store, self.container_store)},
        }

    async def stop(self) -> None:
        """Stop serving and close everything. Pods run on; pooled VMs are destroyed."""
        self.events.close()
        await self.server.stop(SHUTDOWN_GRACE_S)
        await self.streaming.stop()
        await self.flights.close(SHUTDOWN_GRACE_S)
        await self.pool.close()
        await self.tasks.close()
        await self.stats.close()
        await self.pods.close()
        await self.images.close()
        if self.metrics_server is not None:
            self.metrics_server.close()

    def _bind_metrics(self) -> None:
        address, port = self.config.metrics.address, self.config.metrics.port
        if port:
            self.metrics_server = MetricsServer(self.metrics, address, port)

    async def _release_orphans(self) -> None:
        """Release what belongs to no pod or container, quarantined ones included."""
        known = {record.id for record in self.pod_store} | set(self.pod_store.quarantined)
        try:
            await self.networks.gc(known)
        except NetworkError as error:
            log.error("could not release all networks that have no pod: %s", error)
        await self.containers.sweep()
        await self.images.collect()


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises MetricsNotServed, StreamingNotServed, SocketTaken, OSError."""
    daemon = build(config)
    await daemon.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("serving on %s", config.socket)
    await stop.wait()
    log.info("stopping; pods keep running")
    await daemon.stop()


def build(config: Config, overrides: Overrides | None = None) -> Daemon:
    """Make every object of a daemon and start none. Reads /proc and creates the directories of the records.

    Must be called with an event loop running, on which `Daemon.start` is then awaited.
    """
    return _Builder(config, overrides or Overrides()).daemon()


class _Builder:
    """Makes the objects in the order of their dependencies, which have no cycle."""

    def __init__(self, config: Config, overrides: Overrides) -> None:
        self.config = config
        self.overrides = overrides
        root, run = Path(config.root), Path(config.run)
        self.tasks = Tasks()
        self.flights = Flights()
        self.metrics = Metrics(version())
        self.pod_store = Store(root / "pods", PodRecord)
        self.container_store = Store(root / "containers", ContainerRecord)
        self.inventory = Inventory(self.pod_store, self.container_store, run)
        self.events = Events(self.inventory)
        self.exits = Exits(self.inventory)
        self.hypervisor = overrides.hypervisor or Hypervisors()
        self.networks = overrides.networks or _networks(config)
        self.images = overrides.images or self._images()
        self.rootfs = overrides.rootfs or self.images.rootfs
        self.vm_cgroups = overrides.vm_cgroups or cgroup.Cgroups(
            layout=cgroup.find_layout(), root=config.cgroup_root
        )
        self.node = HuskNode(
            config,
            self.hypervisor,
            self.vm_cgroups.layout,
            handlers=overrides.handlers,
            choose_accelerator=overrides.choose_accelerator,
        )
        size = overrides.host_size or HostSize(memory_mib=memory_mib(), cpus=usable_cpus())
        # a VM keeps a CPU busy while it starts; a CNI plug-in mostly waits
        self.vm_starts = Limiter("vm", max(2, size.cpus))
        self.network_setups = Limiter("network", max(4, 2 * size.cpus))
        templates = Templates(run / "templates", self.hypervisor, self.networks, self.vm_cgroups)
        self.vm_step = Vm(self.hypervisor, self.networks, self.vm_cgroups, templates, self.vm_starts, size)
        self.pod_steps = pod_steps(self.vm_step, self.network_setups)
        self.pool = self._pool(templates)
        process_engine, self.processes = self._process_engine()
        self.engines = Engines({Isolation.VM: self._vm_engine(root), Isolation.PROCESS: process_engine})
        self.containers = Containers(
            self.inventory,
            self.engines,
            self.exits,
            ContainerDeps(
                find_image=overrides.find_image or self.images.find,
                rootfs=self.rootfs,
                cdi_dirs=[Path(directory) for directory in config.cdi.spec_dirs],
                on_phase=self.metrics.phase,
            ),
        )
        self.pods = Pods(
            self.inventory,
            self.engines,
            self.containers,
            PodDeps(
                handler=self.node.handler,
                on_started=lambda record: record_start(self.metrics, record),
            ),
        )

    def daemon(self) -> Daemon:
        stats = StatsCollector(self.inventory, self.engines, LayerUsage(self.rootfs))
        streaming = StreamingServer(
            SandboxBackend(self.pods, self.containers),
            StreamingOptions(
                address=self.config.streaming.address,
                port=self.config.streaming.port,
                idle_timeout_s=self.config.streaming.idle_timeout_s,
                tls_cert=self.config.streaming.tls_cert,
                tls_key=self.config.streaming.tls_key,
            ),
        )
        services = self._services(stats, streaming)
        return Daemon(
            config=self.config,
            tasks=self.tasks,
            flights=self.flights,
            metrics=self.metrics,
            inventory=self.inventory,
            pod_store=self.pod_store,
            container_store=self.container_store,
            hypervisor=self.hypervisor,
            networks=self.networks,
            images=self.images,
            preloader=Preloader(
                self.tasks,
                Path(self.config.images.preload_dir),
                Path(self.config.root) / "images/preloaded.json",
                self.images.import_archive,
                lambda id: self.images.index.get(id) is not None,
            ),
            node=self.node,
            events=self.events,
            stats=stats,
            containers=self.containers,
            pods=self.pods,
            pool=self.pool,
            engines=self.engines,
            metric_sources=MetricSources(
                inventory=self.inventory,
                pods=self.pod_store,
                containers=self.container_store,
                images_set_aside=lambda: len(self.images.index.set_aside),
                vm_usage=self._vm_usage,
                process_usage=self.processes.host_cost,
                limiters=lambda: (self.vm_starts, self.network_setups, *self.images.limiters()),
            ),
            streaming=streaming,
            server=Server(Path(self.config.socket), services, Interceptor(self.metrics)),
        )

    def _images(self) -> ImageStore:
        registry = self.config.registry
        options = ImageOptions(
            config_path=Path(registry.config_path),
            auth_file=Path(registry.auth_file),
            trust=registry.trust_policies(),
            pinned=self.config.images.pinned,
            max_downloads=registry.max_concurrent_downloads,
            max_unpacks=registry.max_concurrent_unpacks,
            pull_timeout_s=registry.pull_timeout_s,
            min_free_bytes=registry.min_free_mib << 20,
            limits=registry.limits,
            timing=Timing(
                connect_s=registry.connect_timeout_s,
                stall_s=registry.stall_timeout_s,
                connections=registry.connections_per_layer,
                slow_rate=registry.min_rate_10s,
                low_rate=registry.min_rate_60s,
                blob_s=registry.blob_timeout_s,
                answer_s=registry.answer_timeout_s,
            ),
        )
        return ImageStore(Path(self.config.root), options, self.inventory.layers_in_use)

    def _pool(self, templates: Templates) -> VmPool:
        return VmPool(
            PoolDeps(
                templates=templates,
                vm=self.vm_step,
                steps=self.pod_steps,
                handlers=self.node.handlers,
                handler=self.node.handler,
                accelerator=self.node.accelerator,
                inventory=self.inventory,
                tasks=self.tasks,
            )
        )

    def _vm_engine(self, root: Path) -> Engine:
        return vm_pods.make_engine(
            self.inventory,
            self.exits,
            VmDeps(
                hypervisor=self.hypervisor,
                steps=self.pod_steps,
                pool=self.pool,
                accelerator=self.node.accelerator,
                rootfs=self.rootfs,
                tasks=self.tasks,
                resizer=Resizer(
                    self.inventory,
                    self.overrides.grow_vm or self.vm_step.grow,
                    self.vm_step.confine,
                    self.vm_step.host,
                ),
                default_profile=default_profile(root),
                host_usage=self._vm_usage,
                live_paths=self.config.volumes.live_paths,
            ),
        )

    def _vm_usage(self, pod: Pod) -> HostUsage:
        """Read from files of the host alone, so any thread may call it."""
        if self.overrides.vm_usage is not None:
            return self.overrides.vm_usage(pod)
        handle = pod.record.vm_handle
        assert handle is not None
        directories = self.vm_cgroups.directories(pod.id, pod.record.spec.cgroup_parent)
        return host_usage(handle, directories)

    def _process_engine(self) -> tuple[Engine, ProcessControl]:
        cgroups = self.overrides.process_cgroups or cgroup.Cgroups(
            layout=cgroup.find_layout(whole=True), root=self.config.cgroup_root
        )
        return host_pods.make_engine(
            self.inventory,
            self.exits,
            ProcessDeps(
                cgroups=cgroups,
                networks=self.networks,
                stage=self.network_setups,
                rootfs=self.rootfs,
                tasks=self.tasks,
            ),
        )

    def _services(self, stats: StatsCollector, streaming: StreamingServer) -> Sequence[Service]:
        return (
            runtime_service(
                pods=self.pods,
                containers=self.containers,
                stats=stats,
                events=self.events,
                networks=self.networks,
                node=self.node,
                flights=self.flights,
                streaming=streaming,
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


def _networks(config: Config) -> Networks:
    return Networks(
        conf_dir=Path(config.cni.conf_dir),
        bin_dirs=[Path(directory) for directory in config.cni.bin_dirs],
        cache_dir=Path(config.root) / "cni",
        netns_dir=Path(config.run) / "netns",
    )
