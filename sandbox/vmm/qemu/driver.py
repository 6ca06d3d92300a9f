"""QEMU: one process per pod, unprivileged, in the pod's network namespace and cgroups.

    RUN_DIR/qmp.sock      monitor        mode 0600, owned by root; made and bound by us and
    RUN_DIR/agent.sock    guest channel  listening before QEMU starts, so nobody ever waits for
    RUN_DIR/console.sock  console        one to appear
    RUN_DIR/qemu.log      what QEMU and the virtiofsds say on stderr
    RUN_DIR/console.log   see `console`

QEMU opens nothing by name: all it gets is descriptors (see `opening`). Whom it runs as is in `host`.

Crash story: a VM is found by its handle, or by the run directory and the pod id in the command lines
of its processes. `destroy` needs no more than that and may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sandbox.errors import VmmError, VmmGone
from sandbox.host import process, unix_sockets
from sandbox.host.process import ProcessIdentity, User
from sandbox.host.tasks import end, together
from sandbox.vmm import Hypervisor, Machine, ShareSpec, VmHandle, VmSpec, virtiofsd
from sandbox.vmm.console import Console
from sandbox.vmm.qemu.argv import Fds, NicFds, check, plan
from sandbox.vmm.qemu.descriptors import LOG_FLAGS, has_vhost, identify, keep, open_files, open_ram
from sandbox.vmm.qemu.host import find_firmware, find_program, find_user, private_kvm
from sandbox.vmm.qemu.machine import QemuMachine, end_all, kill_all, said
from sandbox.vmm.qemu.qmp import Monitor

START_TIMEOUT_S = 20.0
MONITOR_TIMEOUT_S = 10.0


class Qemu:
    name = "qemu"

    def __init__(self) -> None:
        self._virtiofsd = virtiofsd.Prober()

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
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
                held.close()  # whatever only QEMU should hold: it sees a helper's end at once
                monitor = await _until_it_answers(run_dir, vmm, identities)
                handle = VmHandle(
                    hypervisor=self.name,
                    spec=spec,
                    vmm=vmm,
                    helpers=identities,
                    channel=f"serial:{run_dir / 'agent.sock'}",
                )
                machine = await _assemble(handle, monitor)
                if spec.template:
                    await _continue(machine)
            except BaseException:
                await self.destroy(spec.pod_id, run_dir)
                await kill_all(begun)  # what is ending by itself has no name any more to be found by
                raise
        return machine

    async def _start_helpers(
        self, spec: VmSpec, log: int, held: contextlib.ExitStack
    ) -> Mapping[str, tuple[ProcessIdentity, int]]:
        """A virtiofsd per share, and our end of its connection."""
        if not spec.shares:
            return {}
        daemon = await self._virtiofsd.find()

        async def start(share: ShareSpec) -> tuple[ProcessIdentity, int]:
            identity, connection = await virtiofsd.start_virtiofsd(
                daemon,
                virtiofsd.Share(source=share.source, cache=share.cache),
                at=Path(spec.run_dir) / f"fs-{share.tag}.sock",
                cgroups=spec.cgroups,
                log_fd=log,
            )
            return identity, held.enter_context(connection).fileno()

        started = await together(*(start(share) for share in spec.shares))
        return {share.tag: each for share, each in zip(spec.shares, started, strict=True)}

    async def fingerprint(self, spec: VmSpec) -> str:
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
        run_dir = Path(handle.spec.run_dir)
        if not process.alive(handle.vmm):
            raise VmmGone(f"QEMU (process {handle.vmm.pid}) does not run any more{said(run_dir)}")
        try:
            monitor = await Monitor.connect(run_dir / "qmp.sock", MONITOR_TIMEOUT_S)
        except VmmGone as error:
            raise VmmGone(f"{error}{said(run_dir)}") from error
        return await _assemble(handle, monitor)

    async def destroy(self, spec_pod_id: str, run_dir: Path) -> None:
        await end_all(spec_pod_id, run_dir)
        for name in ("qmp.sock", "agent.sock", "console.sock"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (run_dir / name).unlink()


def make() -> Hypervisor:
    return Qemu()


# ----------------------------------------------------------------------------------- starting


async def _launch(program: str, spec: VmSpec, fds: Fds, user: User, log: int) -> ProcessIdentity:
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


async def _assemble(handle: VmHandle, monitor: Monitor) -> QemuMachine:
    """Takes over the monitor. Raises VmmGone."""
    run_dir = Path(handle.spec.run_dir)
    try:
        connection = unix_sockets.connect(run_dir / "console.sock")
    except OSError as error:
        await monitor.close()
        raise VmmGone(f"QEMU's console at {run_dir}: {error}") from error
    return QemuMachine(handle, monitor, Console(connection, run_dir))


async def _continue(machine: QemuMachine) -> None:
    """Load the state of the template, and plug in what could not be saved with it.

    Raises VmmError with what QEMU said of a state that it does not like; the machine is closed then.
    """
    try:
        await machine.restore()
    except BaseException as error:
        await machine.close()
        if isinstance(error, VmmGone | OSError):
            tail = said(Path(machine.handle.spec.run_dir))
            raise VmmError(f"the template cannot be continued: {error}{tail}") from error
        raise


async def _until_it_answers(
    run_dir: Path, vmm: ProcessIdentity, helpers: Mapping[str, ProcessIdentity]
) -> Monitor:
    """QEMU greets on its monitor when all devices are made; if it ends before, it has said why."""
    greeting = asyncio.create_task(Monitor.connect(run_dir / "qmp.sock", START_TIMEOUT_S))
    ends = {"QEMU": asyncio.create_task(process.wait_exit(vmm))}
    ends |= {f"virtiofsd for {tag}": asyncio.create_task(process.wait_exit(h)) for tag, h in helpers.items()}
    try:
        await asyncio.wait(
            {greeting, *ends.values()}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not any(end.done() for end in ends.values()):
            if not greeting.done():
                raise VmmError(f"QEMU was not ready within {START_TIMEOUT_S:g} s{said(run_dir)}")
            if greeting.exception() is None:
                return greeting.result()
        # One end brings the others about: wait for them, so that what is told is the whole story.
        await asyncio.wait(ends.values(), timeout=0.5)
        ended = [f"{name} (status {each.result()})" for name, each in ends.items() if each.done()]
        raise VmmError(f"ended while starting: {', '.join(ended) or 'monitor'}{said(run_dir)}")
    except BaseException:
        if greeting.done() and not greeting.cancelled() and greeting.exception() is None:
            await greeting.result().close()
        raise
    finally:
        await end(greeting, *ends.values())
