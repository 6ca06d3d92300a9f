"""Where VMs come from: booted, restored from a template, or acquired from a pool of restored ones.

    boot       the kernel boots, in a VM of the pod's size
    template   a copy of a VM that was saved once its agent was ready; grown where the pod needs more
    pool       a copy of the template, made in advance and paused, so it costs only memory

A handler's configuration says which (`source`). Each falls back to the one above it: an empty pool to
the template, a template that does not exist yet or cannot be restored to a boot. A driver that cannot
save VMs boots all of them, and one that cannot pause them has no pool.

A pooled VM is a pod whose spec is not known yet: it has an id, a record (WAITING) and the first of a
pod's steps. Claiming it gives it a spec and runs the remaining steps, so every name derives from the pod
id, and rollback, stop and recovery are those of any pod.

Crash story: a pooled VM whose daemon was killed is taken down by the next one, by its record. A daemon
that receives SIGTERM takes its own down.
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
from sandbox.errors import GuestError, MissingProgram, PhaseFailed, SandboxError
from sandbox.host.tasks import Tasks, end
from sandbox.inventory import Inventory
from sandbox.lifecycle import bring_up, held_steps, take_down
from sandbox.plan.shares import GUEST_ROOTFS
from sandbox.plan.vm import base_size, can_grow, plan_vm
from sandbox.pod import Pod
from sandbox.records import PodRecord, PodState, Source, VmRuntime
from sandbox.spec import Handler, PodId, PodSpec, VmSize
from sandbox.vm_pods.accelerator import AcceleratorChoice
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.steps import PodSteps, Vm
from sandbox.vm_pods.templates import Templates
from sandbox.vm_pods.warmup import warm_network, warm_up
from sandbox.vmm import Feature, VmSpec

log = logging.getLogger(__name__)

QUIET_S = 1.0  # without a claim, before the next VM is made
RETRY_S = 30.0  # until a failed template or VM is retried; also the interval of checks for a new guest image


@dataclass(frozen=True, slots=True)
class PoolDeps:
    """What the pool is built from."""

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
    """A pod of the pool, and the task that waits for the exit of its VM."""

    pod: Pod
    watch: asyncio.Task[None]


class VmPool:
    """Keeps `pool_size` paused VMs ready for each handler, and the templates that they are restored from.

    One task makes templates and VMs, one after the other, at the lowest priority of the limiter.
    """

    def __init__(self, deps: PoolDeps) -> None:
        self._deps = deps
        # by fingerprint: handlers with equal VMs share a pool, and a new guest image or VMM starts a new one
        self._pools: dict[str, list[PooledVm]] = {}
        self._wanted = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False
        self._problems: dict[str, str] = {}  # by handler: logged once
        self._claimed_s = -QUIET_S  # of the last claim, on the monotonic clock

    async def start(self) -> None:
        """Take down the template that a killed daemon was making, and start filling the pools."""
        try:
            await self._deps.templates.clean()
        except (SandboxError, NetworkError, OSError) as error:
            log.error("could not take down the VM of an unfinished template: %s", error)
        self._keeper = self._deps.tasks.spawn(self._keep(), "pool")

    async def close(self) -> None:
        """Take down all pooled VMs, as the next daemon would not use them."""
        self._closing = True
        if self._keeper is not None:
            await end(self._keeper)
        everyone = [each for pool in self._pools.values() for each in pool]
        self._pools.clear()
        await asyncio.gather(*(self._release(each) for each in everyone))
        with contextlib.suppress(SandboxError, NetworkError, OSError):
            await self._deps.templates.clean()

    # ------------------------------------------------------------------------------- for pods

    async def acquire(self, handler: Handler, choice: AcceleratorChoice, size: VmSize) -> Pod | None:
        """Return a pooled pod that can be grown to this size, which the caller owns from now on.

        None: the pool is empty, or the handler has none. Raises MissingProgram.
        """
        spec = self._spec(handler, choice)
        if handler.source != "pool" or not can_grow(spec, size):
            return None
        pool = self._pools.get(await self._deps.vm.hypervisor.fingerprint(spec))
        if not pool:
            return None
        self._claimed_s = time.monotonic()
        pooled = pool.pop(0)
        pooled.watch.cancel()
        return pooled.pod

    # ------------------------------------------------------------------------------- filling

    def replenish(self) -> None:
        """Check soon whether VMs or templates are missing. Returns at once."""
        self._wanted.set()

    async def _keep(self) -> None:
        while not self._closing:
            self._wanted.clear()
            keys: set[str] = set()
            for name in self._deps.handlers():
                with self._contained(name):
                    await self._fill(name, keys)
            for key in self._pools.keys() - keys:
                await asyncio.gather(*(self._release(stale) for stale in self._pools.pop(key)))
            await asyncio.to_thread(self._deps.templates.keep_only, keys)
            with contextlib.suppress(TimeoutError):
                # not wait_for, which may swallow a cancellation (until Python 3.12)
                async with asyncio.timeout(RETRY_S):
                    await self._wanted.wait()

            await self._quiet()

    async def _quiet(self) -> None:
        """Wait until no pod was claimed for QUIET_S, as making a VM would slow the start of pods down."""
        # each claim restarts the pause
        while (pause_s := self._claimed_s + QUIET_S - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(pause_s)

    @contextlib.contextmanager
    def _contained(self, name: str) -> Iterator[None]:
        """Log the error of a handler once, as long as it stays the same; the next round retries.

        Catches everything, as the task of the pool must go on.
        """
        try:
            yield
        except Exception as error:
            problem = error.reason if isinstance(error, PhaseFailed) else str(error)  # without the time
            if self._problems.get(name) != problem:
                level = logging.DEBUG if isinstance(error, MissingProgram) else logging.ERROR
                log.log(level, "could not make a VM in advance for handler %r: %s", name, error)
            self._problems[name] = problem
        else:
            self._problems.pop(name, None)

    async def _fill(self, name: str, keys: set[str]) -> None:
        """Make the missing template and VMs of one handler, and add its fingerprint to `keys`."""
        handler = self._deps.handler(name)
        if handler.source == "boot":
            return
        choice = await self._deps.accelerator(handler)
        spec = self._spec(handler, choice)
        features = self._deps.vm.hypervisor.features(spec)
        if Feature.SAVE not in features:
            return  # its pods boot their VMs
        key = await self._deps.vm.hypervisor.fingerprint(spec)
        keys.add(key)
        if self._deps.templates.find(key) is None:
            async with self._deps.vm.stage.slot(idle=True):
                await self._deps.templates.make(spec, key)
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
            host=self._deps.vm.host,
        )

    async def _make(self, handler: Handler, choice: AcceleratorChoice, pool: list[PooledVm]) -> PooledVm:
        """Make a paused VM of the handler's size. Raises PhaseFailed; then nothing is left of it."""
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
        pod = self._deps.inventory.make_pod(record)
        pod.handler = handler
        pod.update()
        try:
            await bring_up(self._deps.steps.ahead, pod)
            await self._warm(pod)
            machine = link_of(pod).machine
            assert machine is not None
            await machine.pause()
        except BaseException:  # also when cancelled: the daemon is ending, and the VM would never be claimed
            await self._take_down(pod)
            raise
        return PooledVm(pod, self._deps.tasks.spawn(self._watch(pod, pool), f"watch of VM {pod.id[:12]}"))

    async def _warm(self, pod: Pod) -> None:
        """Run a container, so that the pod's first one starts as fast as its second. A VM in which that fails
        is still usable."""
        client = await link_of(pod).guest()
        try:
            await warm_network(client)
            await warm_up(client, pod.back_of(pod.rootfs_share) / "warm", f"{GUEST_ROOTFS}/warm")
        except GuestError as error:
            log.warning("pooled VM %s is kept though its warm-up container failed: %s", pod.id, error)

    async def _watch(self, pod: Pod, pool: list[PooledVm]) -> None:
        machine = link_of(pod).machine
        assert machine is not None
        reason = await machine.wait()
        log.error("pooled VM %s ended: %s", pod.id, reason)
        for dead in [each for each in pool if each.pod is pod]:
            pool.remove(dead)
        await self._take_down(pod)
        self._wanted.set()

    async def _release(self, pooled: PooledVm) -> None:
        pooled.watch.cancel()
        await self._take_down(pooled.pod)

    async def _take_down(self, pod: Pod) -> None:
        """Release all that the pod holds; what fails stays in the record, for the next start."""
        held = held_steps(self._deps.steps.whole, pod.record.steps)
        try:
            await take_down(held, pod)
        except SandboxError as error:
            log.error("could not take down pooled VM %s: %s", pod.id, error)
        else:
            pod.forget()
