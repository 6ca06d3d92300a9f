"""Where VMs come from: booted, continued from a template, or taken from a pool of those that wait.

    boot       from the kernel on, of the pod's own size
    template   a copy of a VM that was saved once its agent was ready; grown where the pod needs more
    pool       the same, made before anybody asked for it; paused until then, so it costs memory only

A handler's configuration says which (`source`). Each falls back to the one before it: a pool that is
empty to the template, a template that is not there yet or cannot be continued to a boot.

A VM of the pool is a pod whose spec is not known yet: it has an id, a record (WAITING) and the first
steps of its walk. Claiming it is giving it a spec and walking on, so every name derives from the pod
id as ever, and undoing, stopping and recovery are what they are for any pod.

Crash story: a pod that waited when the daemon ended is taken down by the next one, by its record. A
daemon that is told to end takes its own down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from network.errors import NetworkError
from sandbox.errors import GuestError, MissingProgram, SandboxError
from sandbox.host.tasks import Tasks, end
from sandbox.inventory import Inventory
from sandbox.lifecycle import bring_up, held_steps, take_down
from sandbox.plan.shares import GUEST_ROOTFS
from sandbox.plan.vm import base_size, can_grow, plan_vm
from sandbox.pod import Pod
from sandbox.records import PodRecord, PodState, Source, VmRuntime
from sandbox.spec import Handler, PodId, PodSpec, VmSize
from sandbox.vm_pods.accelerator import AcceleratorChoice
from sandbox.vm_pods.steps import PodSteps, Vm
from sandbox.vm_pods.templates import Templates
from sandbox.vm_pods.warmup import warm_network, warm_up
from sandbox.vmm import Feature, VmSpec

log = logging.getLogger(__name__)

QUIET_S = 1.0  # without a claim, before the next VM is made
RETRY_S = 30.0  # after a template or a pool could not be made; also how often a new guest image is looked for


@dataclass(frozen=True, slots=True)
class PoolDeps:
    """What the factory needs of the host."""

    templates: Templates
    vm: Vm
    steps: PodSteps
    handlers: Callable[[], Sequence[str]]
    handler: Callable[[str], Handler]  # raises InvalidSpec, MissingProgram
    accelerator: Callable[[Handler], Awaitable[AcceleratorChoice]]
    inventory: Inventory
    tasks: Tasks


@dataclass(slots=True)
class PooledVm:
    """A pod of the pool."""

    pod: Pod
    watch: asyncio.Task[None]


class VmPool:
    def __init__(self, host: PoolDeps) -> None:
        self._host = host
        # by fingerprint, so that handlers which want the same VMs share them, and a new guest image or
        # VMM has a pool of its own from the start
        self._pools: dict[str, list[PooledVm]] = {}
        self._wanted = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False
        self._problems: dict[str, str] = {}  # by handler: said once
        self._claimed_s = -QUIET_S  # moment of the last claim

    async def start(self) -> None:
        """Clean up what a daemon that was killed was making, and begin to fill the pools."""
        try:
            await self._host.templates.clean()
        except (SandboxError, NetworkError, OSError) as error:
            log.error("what is left of a template that was being made cannot be removed: %s", error)
        self._keeper = self._host.tasks.spawn(self._keep(), "pool")

    async def close(self) -> None:
        """End what waits for a pod: nobody would claim it any more."""
        self._closing = True
        if self._keeper is not None:
            await end(self._keeper)
        everyone = [each for pool in self._pools.values() for each in pool]
        self._pools.clear()
        await asyncio.gather(*(self._release(each) for each in everyone))
        with contextlib.suppress(SandboxError, NetworkError, OSError):
            await self._host.templates.clean()

    # ------------------------------------------------------------------------------- for pods

    async def take(self, handler: Handler, choice: AcceleratorChoice, size: VmSize) -> Pod | None:
        """A pod of the pool that can be given this size; it is the caller's from now on. None when there
        is none to have. Raises MissingProgram."""
        spec = self._spec(handler, choice)
        if handler.source != "pool" or not can_grow(spec, size):
            return None
        pool = self._pools.get(await self._host.vm.hypervisor.fingerprint(spec))
        if not pool:
            return None
        self._claimed_s = time.monotonic()
        waiting = pool.pop(0)
        waiting.watch.cancel()
        return waiting.pod

    # ------------------------------------------------------------------------------- filling

    def look(self) -> None:
        """Something may be missing: see to it soon."""
        self._wanted.set()

    async def _keep(self) -> None:
        while not self._closing:
            self._wanted.clear()
            keys: set[str] = set()
            for name in self._host.handlers():
                with self._contained(name):
                    await self._tend(name, keys)
            for key in self._pools.keys() - keys:
                await asyncio.gather(*(self._release(stale) for stale in self._pools.pop(key)))
            await asyncio.to_thread(self._host.templates.keep_only, keys)
            with contextlib.suppress(TimeoutError):
                # not wait_for, which may swallow a cancellation (until Python 3.12)
                async with asyncio.timeout(RETRY_S):
                    await self._wanted.wait()

            await self._quiet()

    async def _quiet(self) -> None:
        """Pods are being started: making the next VM now would slow them down."""
        # each claim begins the pause anew
        while (pause_s := self._claimed_s + QUIET_S - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(pause_s)

    @contextlib.contextmanager
    def _contained(self, name: str) -> Iterator[None]:
        """A handler that cannot be served ahead is told of once; its pods say why they fail.

        This is where the task has its edge: whatever goes wrong, the next look is another try.
        """
        try:
            yield
        except Exception as error:
            if self._problems.get(name) != str(error):
                level = logging.DEBUG if isinstance(error, MissingProgram) else logging.ERROR
                log.log(level, "no VM can be made ahead for handler %r: %s", name, error)
            self._problems[name] = str(error)
        else:
            self._problems.pop(name, None)

    async def _tend(self, name: str, keys: set[str]) -> None:
        """Template and pool of one handler as they should be."""
        handler = self._host.handler(name)
        if handler.source == "boot":
            return
        choice = await self._host.accelerator(handler)
        spec = self._spec(handler, choice)
        features = self._host.vm.hypervisor.features(spec)
        if Feature.SAVE not in features:
            return  # its pods boot their VMs
        key = await self._host.vm.hypervisor.fingerprint(spec)
        keys.add(key)
        if self._host.templates.find(key) is None:
            async with self._host.vm.stage.slot(idle=True):
                await self._host.templates.make(spec, key)
        pool = self._pools.setdefault(key, [])
        pooled = handler.source == "pool" and Feature.PAUSE in features
        while not self._closing and pooled and len(pool) < handler.pool_size:
            pool.append(await self._make(handler, choice, pool))

    def _spec(self, handler: Handler, choice: AcceleratorChoice) -> VmSpec:
        size = base_size(handler)
        return plan_vm(
            handler,
            accelerator=choice.accelerator,
            options=choice.options,
            size=size,
            host=self._host.vm.host,
        )

    async def _make(self, handler: Handler, choice: AcceleratorChoice, pool: list[PooledVm]) -> PooledVm:
        """A paused VM of the handler's size. Raises PhaseFailed; then nothing is left of it."""
        record = PodRecord(
            id=PodId(secrets.token_hex(32)),
            spec=PodSpec(name="", namespace="", uid="", handler=handler.name),
            created_at_ns=time.time_ns(),
            state=PodState.WAITING,
            runtime=VmRuntime(
                size=base_size(handler),
                source=Source.POOL,
                accelerator=choice.accelerator,
                options=choice.options,
                token=secrets.token_bytes(16),
            ),
        )
        pod = self._host.inventory.make_pod(record)
        pod.handler = handler
        pod.update()
        try:
            await bring_up(self._host.steps.ahead, pod)
            await self._warm(pod)
            assert pod.machine is not None
            await pod.machine.pause()
        except BaseException:  # also when the daemon is told to end: nobody would claim it
            await self._take_down(pod)
            raise
        return PooledVm(pod, self._host.tasks.spawn(self._watch(pod, pool), f"watch of VM {pod.id[:12]}"))

    async def _warm(self, pod: Pod) -> None:
        """Its first container will then start as fast as the second. Without that it still is of use."""
        client = await pod.guest()
        try:
            await warm_network(client)
            await warm_up(client, pod.back_of(pod.rootfs_share) / "warm", f"{GUEST_ROOTFS}/warm")
        except GuestError as error:
            log.warning("VM %s waits without having run a container: %s", pod.id, error)

    async def _watch(self, pod: Pod, pool: list[PooledVm]) -> None:
        assert pod.machine is not None
        reason = await pod.machine.wait()
        log.error("VM %s ended while it waited for a pod: %s", pod.id, reason)
        for dead in [each for each in pool if each.pod is pod]:
            pool.remove(dead)
        await self._take_down(pod)
        self._wanted.set()

    async def _release(self, waiting: PooledVm) -> None:
        waiting.watch.cancel()
        await self._take_down(waiting.pod)

    async def _take_down(self, pod: Pod) -> None:
        """What cannot be released stays in the record, for the next start."""
        held = held_steps(self._host.steps.whole, pod.record.steps)
        try:
            await take_down(held, pod)
        except SandboxError as error:
            log.error("VM %s cannot be released: %s", pod.id, error)
        else:
            pod.forget()
