"""QEMU: one process per pod, unprivileged, in the pod's network namespace and cgroups.

    RUN_DIR/qmp.sock      monitor        mode 0600, owned by root; bound and listening before
    RUN_DIR/agent.sock    guest channel  QEMU starts, so no client has to poll for a socket
    RUN_DIR/console.sock  console        to appear
    RUN_DIR/qemu.log      stderr of QEMU and the virtiofsds
    RUN_DIR/console.log   see `console`

QEMU opens nothing by name: it inherits descriptors (see `descriptors`). `host` chooses its user.

Crash story: a VM is found by its handle, or by the run directory and the pod id in the command lines
of its processes. `destroy` needs no more than that and is idempotent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from sandbox.errors import HelperGone, VmmError, VmmGone
from sandbox.host import process, unix_sockets
from sandbox.host.process import Credentials, ProcessIdentity
from sandbox.host.tasks import end, together
from sandbox.vmm import Feature, Machine, ShareSpec, VmHandle, VmSpec, virtiofsd
from sandbox.vmm.console import Console
from sandbox.vmm.qemu import shares
from sandbox.vmm.qemu.argv import NAME, Fds, NicFds, check, plan
from sandbox.vmm.qemu.descriptors import LOG_FLAGS, has_vhost, identify, keep, open_files, open_ram
from sandbox.vmm.qemu.host import find_firmware, find_program, find_user, private_kvm
from sandbox.vmm.qemu.machine import QemuMachine, describe_end, end_all, kill_all, log_tail
from sandbox.vmm.qemu.qmp import Monitor

START_TIMEOUT_S = 20.0
MONITOR_TIMEOUT_S = 10.0


class Qemu:
    """The driver: see `sandbox.vmm.Hypervisor`. It keeps no state about VMs."""

    def __init__(self) -> None:
        self._virtiofsd = virtiofsd.Prober()

    def features(self, spec: VmSpec) -> Collection[Feature]:
        """See Hypervisor: QEMU has all of them."""
        return frozenset(Feature)

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
        """See Hypervisor. Helpers and RAM are prepared at the same time."""
        check(spec)
        program = find_program()
        find_firmware()
        run_dir = Path(spec.run_dir)
        user = find_user(spec.accelerator)
        begun: list[ProcessIdentity] = []
        with contextlib.ExitStack() as held:
            try:
                fds = open_files(spec, taps, held)
                log = keep(held, os.open(run_dir / "qemu.log", LOG_FLAGS, 0o600))
                ram, helpers = await together(
                    open_ram(spec, user, held), self._start_helpers(spec, log, held)
                )
                fds = msgspec.structs.replace(
                    fds, ram=ram, shares={tag: connection for tag, (_, connection) in helpers.items()}
                )
                identities = {tag: identity for tag, (identity, _) in helpers.items()}
                begun += identities.values()
                vmm = await _launch(program, spec, fds, user, log)
                begun.append(vmm)
                held.close()  # so that QEMU alone holds its ends, and notices a helper's exit at once
                monitor = await _connect_monitor(run_dir, vmm, identities)
                handle = VmHandle(
                    hypervisor=NAME,
                    spec=spec,
                    vmm=vmm,
                    helpers=identities,
                    channel=f"serial:{run_dir / 'agent.sock'}",
                )
                machine = await self._assemble(handle, monitor)
                if spec.template:
                    await _restore(machine)
            except BaseException:
                await self.destroy(spec.pod_id, run_dir)
                await kill_all(begun)  # a process that is exiting cannot be found by its arguments any more
                raise
        return machine

    async def _start_helpers(
        self, spec: VmSpec, log: int, held: contextlib.ExitStack
    ) -> Mapping[str, tuple[ProcessIdentity, int]]:
        """Start a virtiofsd for each share. Returns it with the descriptor of the connection to it."""
        if not spec.shares:
            return {}
        daemon = await self._virtiofsd.find()

        async def start(share: ShareSpec) -> tuple[ProcessIdentity, int]:
            identity, connection = await shares.start(daemon, spec, share, log)
            return identity, held.enter_context(connection).fileno()

        started = await together(*(start(share) for share in spec.shares))
        return {share.tag: each for share, each in zip(spec.shares, started, strict=True)}

    async def fingerprint(self, spec: VmSpec) -> str:
        """See Hypervisor. Files count by inode, size and modification time, not by content."""
        program = find_program()
        fds = Fds(monitor=3, console=4, channel=5, kernel=6, initramfs=7, ram=8)
        nics = tuple(NicFds(tap=9, vhost=10 if has_vhost() else -1) for _ in spec.nics)
        bare = msgspec.structs.replace(
            spec, pod_id="any", run_dir="/", shares=(), netns="", cgroups=(), template="", savable=True
        )
        argv = plan(program, bare, msgspec.structs.replace(fds, nics=nics)).argv
        files = [identify(path) for path in (program, find_firmware(), spec.kernel, spec.initramfs)]
        return hashlib.sha256(msgspec.json.encode([argv, files])).hexdigest()[:32]

    async def attach(self, handle: VmHandle) -> Machine:
        """See Hypervisor."""
        run_dir = Path(handle.spec.run_dir)
        if not process.alive(handle.vmm):
            raise VmmGone(f"QEMU (process {handle.vmm.pid}) has exited{log_tail(run_dir)}")
        for tag, helper in handle.helpers.items():
            if not process.alive(helper):
                reason = describe_end(tag, None) + log_tail(run_dir)
                if await asyncio.to_thread(shares.find, handle, tag):
                    raise VmmGone(f"{reason}: the record names another process for it")
                raise HelperGone(reason)
        try:
            monitor = await Monitor.connect(run_dir / "qmp.sock", MONITOR_TIMEOUT_S)
        except VmmGone as error:
            raise VmmGone(f"{error}{log_tail(run_dir)}") from error
        return await self._assemble(handle, monitor)

    async def _assemble(self, handle: VmHandle, monitor: Monitor) -> QemuMachine:
        """Connect to the console. Owns `monitor`, also when it raises VmmGone."""
        run_dir = Path(handle.spec.run_dir)
        try:
            connection = unix_sockets.connect(run_dir / "console.sock")
        except OSError as error:
            await monitor.close()
            raise VmmGone(f"QEMU's console at {run_dir}: {error}") from error
        return QemuMachine(handle, monitor, Console(connection, run_dir), self._virtiofsd)

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        """See Hypervisor."""
        await end_all(pod_id, run_dir)
        for name in ("qmp.sock", "agent.sock", "console.sock"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (run_dir / name).unlink()


# ----------------------------------------------------------------------------------- starting


async def _launch(program: str, spec: VmSpec, fds: Fds, user: Credentials, log: int) -> ProcessIdentity:
    launch = plan(program, spec, fds)
    try:
        binds = private_kvm(Path(spec.run_dir), user) if spec.accelerator == "kvm" else {}
        return await process.start(
            launch.argv,
            cgroups=spec.cgroups,
            user=user,
            netns=spec.netns,
            pass_fds=launch.pass_fds,
            stdout=log,
            stderr=log,
            binds=binds,
        )
    except OSError as error:
        raise VmmError(f"QEMU could not be started: {error}") from error


async def _restore(machine: QemuMachine) -> None:
    """Load the template's state and plug in the shares, which could not be saved with it.

    Raises VmmError with QEMU's output when it rejects the state; the machine is closed then.
    """
    try:
        await machine.restore()
    except BaseException as error:
        await machine.close()
        if isinstance(error, VmmGone | OSError):
            tail = log_tail(Path(machine.handle.spec.run_dir))
            raise VmmError(f"the template cannot be restored: {error}{tail}") from error
        raise


async def _connect_monitor(
    run_dir: Path, vmm: ProcessIdentity, helpers: Mapping[str, ProcessIdentity]
) -> Monitor:
    """Wait for QEMU's greeting, which it sends once all devices exist. Raises VmmError with its output when
    it or a helper exits before, or after START_TIMEOUT_S."""
    greeting = asyncio.create_task(Monitor.connect(run_dir / "qmp.sock", START_TIMEOUT_S))
    ends = {"QEMU": asyncio.create_task(process.wait_exit(vmm))}
    ends |= {f"virtiofsd for {tag}": asyncio.create_task(process.wait_exit(h)) for tag, h in helpers.items()}
    try:
        await asyncio.wait(
            {greeting, *ends.values()}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not any(end.done() for end in ends.values()):
            if not greeting.done():
                raise VmmError(f"QEMU was not ready within {START_TIMEOUT_S:g} s{log_tail(run_dir)}")
            if greeting.exception() is None:
                return greeting.result()
        # One exit causes the others: wait for them, so that the message names all of them.
        await asyncio.wait(ends.values(), timeout=0.5)
        ended = [f"{name} (status {each.result()})" for name, each in ends.items() if each.done()]
        raise VmmError(f"exited while starting: {', '.join(ended) or 'monitor'}{log_tail(run_dir)}")
    except BaseException:
        if greeting.done() and not greeting.cancelled() and greeting.exception() is None:
            await greeting.result().close()
        raise
    finally:
        await end(greeting, *ends.values())
