"""QEMU: one process per pod, unprivileged, in the pod's network namespace and cgroups.

    RUN_DIR/qmp.sock      monitor        mode 0600, owned by root; made and bound by us and
    RUN_DIR/agent.sock    guest channel  listening before QEMU starts, so nobody ever waits for
    RUN_DIR/console.sock  console        one to appear
    RUN_DIR/qemu.log      what QEMU and the virtiofsds say on stderr
    RUN_DIR/console.log   see `console`

QEMU opens nothing by name: all it gets is descriptors. It runs as the user `husk-vm`, or without
such a user under a number of its own that no distribution gives out, so that neither files nor
processes of anybody are within its reach.

Crash story: a VM is found by its handle, or by the run directory and the pod id in the command lines
of its processes. `destroy` needs no more than that and may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sandbox import process, sockets, virtiofs
from sandbox.errors import DeadlineExceeded, MissingProgram, VmmError, VmmGone
from sandbox.process import ProcessIdentity, User
from sandbox.vmm import Hypervisor, Machine, VmHandle, VmSpec
from sandbox.vmm.console import Console, printable
from sandbox.vmm.launch import Fds, NicFds, check, plan, process_name
from sandbox.vmm.qmp import Monitor

PROGRAM = "qemu-system-x86_64"
PACKAGE = "apt-get install qemu-system-x86"
USER = "husk-vm"
FALLBACK_ID = 60606  # in a range that no distribution assigns: systemd, "Users, Groups, UIDs and GIDs"
FIRMWARE = ("/usr/share/qemu/qboot.rom", "/usr/share/qboot/qboot.rom", "/usr/local/share/qemu/qboot.rom")

START_TIMEOUT_S = 20.0
MONITOR_TIMEOUT_S = 10.0
LOG_LIMIT = 256 << 10


class Qemu:
    name = "qemu"

    def __init__(self) -> None:
        self._virtiofsd = virtiofs.Finder()

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> VmHandle:
        check(spec)
        program = find_program()
        find_firmware()
        daemon = await self._virtiofsd.find() if spec.shares else None
        run_dir = Path(spec.run_dir)
        helpers: dict[str, ProcessIdentity] = {}
        with contextlib.ExitStack() as held:
            try:
                fds = _open_files(spec, taps, held)
                log = _keep(held, os.open(run_dir / "qemu.log", _LOG_FLAGS, 0o600))
                connections: dict[str, int] = {}
                for share in spec.shares:
                    assert daemon is not None
                    helpers[share.tag], connection = await virtiofs.start_virtiofsd(
                        daemon,
                        virtiofs.Share(source=share.source, cache=share.cache),
                        at=run_dir / f"fs-{share.tag}.sock",
                        cgroups=spec.cgroups,
                        log_fd=log,
                    )
                    held.enter_context(connection)
                    connections[share.tag] = connection.fileno()
                vmm = await _launch(program, spec, _with_shares(fds, connections), log)
                held.close()  # whatever only QEMU should hold: it sees a helper's end at once
                await _until_it_answers(run_dir, vmm, helpers)
            except BaseException:
                await self.destroy(spec.pod_id, run_dir)
                raise
        channel = f"serial:{run_dir / 'agent.sock'}"
        return VmHandle(hypervisor=self.name, spec=spec, vmm=vmm, helpers=helpers, channel=channel)

    async def attach(self, handle: VmHandle) -> Machine:
        run_dir = Path(handle.spec.run_dir)
        if not process.alive(handle.vmm):
            raise VmmGone(f"QEMU (process {handle.vmm.pid}) does not run any more{_said(run_dir)}")
        try:
            connection = sockets.connect(run_dir / "console.sock")
        except OSError as error:
            raise VmmGone(f"QEMU's console at {run_dir}: {error}") from error
        console = Console(connection, run_dir)
        try:
            monitor = await Monitor.connect(run_dir / "qmp.sock", MONITOR_TIMEOUT_S)
        except BaseException as error:
            await console.close()
            if isinstance(error, VmmGone):
                raise VmmGone(f"{error}{_said(run_dir)}") from error
            raise
        return QemuMachine(handle, monitor, console)

    async def destroy(self, spec_pod_id: str, run_dir: Path) -> None:
        await _end_all(spec_pod_id, run_dir)
        for name in ("qmp.sock", "agent.sock", "console.sock"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (run_dir / name).unlink()


async def _end_all(pod_id: str, run_dir: Path) -> None:
    """End every process of a pod's VM, found by name alone.

    A virtiofsd may fork its child, which runs in namespaces of its own, between the look and the
    kill, so the last look is one that finds nothing. Raises DeadlineExceeded as `process.kill` does.
    """
    names = (process_name(pod_id), f"{run_dir}/")
    while found := await asyncio.to_thread(process.find_by_argument, *names):
        await _kill_all(found)


def make() -> Hypervisor:
    return Qemu()


class QemuMachine:
    """A running QEMU, just started or adopted."""

    def __init__(self, handle: VmHandle, monitor: Monitor, console: Console) -> None:
        self.handle = handle
        self._monitor = monitor
        self._console = console
        self._run_dir = Path(handle.spec.run_dir)
        self._trim = asyncio.create_task(_keep_short(self._run_dir / "qemu.log"), name="qemu-log")

    async def wait(self) -> str:
        status = await process.wait_exit(self.handle.vmm)
        await self._console.drain()
        reason = self._monitor.ending or "QEMU ended"
        if status is not None and status < 0:
            reason += f" (signal {-status})"
        elif status:
            reason += f" (status {status})"
        for tag, helper in self.handle.helpers.items():
            # They end with the connection; one that went first is the likely cause.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    ended = await process.wait_exit(helper)
                    reason += f"; virtiofsd for {tag} failed ({ended})" if ended else ""
        return reason + _said(self._run_dir)

    async def kill(self) -> None:
        await _kill_all([self.handle.vmm, *self.handle.helpers.values()])
        await _end_all(self.handle.spec.pod_id, self._run_dir)

    def console_tail(self) -> str:
        return self._console.tail()

    async def describe(self) -> Mapping[str, str]:
        facts = {
            "hypervisor": "qemu",
            "accelerator": self.handle.spec.accelerator,
            "memoryMiB": str(self.handle.spec.memory_mib),
            "vcpus": str(self.handle.spec.vcpus),
            "pid": str(self.handle.vmm.pid),
        }
        facts |= {f"virtiofsd.{tag}.pid": str(helper.pid) for tag, helper in self.handle.helpers.items()}
        try:
            status = await self._monitor.execute("query-status")
            version = await self._monitor.execute("query-version")
        except (VmmError, DeadlineExceeded) as error:
            return facts | {"state": f"unknown: {error}"}
        if isinstance(status, dict):
            facts["state"] = str(status.get("status", ""))
        if isinstance(version, dict) and isinstance(version.get("qemu"), dict):
            numbers = version["qemu"]
            facts["version"] = ".".join(str(numbers.get(part)) for part in ("major", "minor", "micro"))
        return facts

    async def close(self) -> None:
        """Idempotent."""
        self._trim.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._trim
        await self._monitor.close()
        await self._console.close()


# ----------------------------------------------------------------------------------- the host


def find_program() -> str:
    """Raises MissingProgram."""
    found = shutil.which(PROGRAM, path=process.ENVIRONMENT["PATH"])
    if found is None:
        raise MissingProgram("QEMU", PACKAGE)
    return found


def find_firmware() -> str:
    """qboot, the firmware that does the least; QEMU finds it by its name. Raises MissingProgram."""
    for place in FIRMWARE:
        if os.access(place, os.R_OK):
            return place
    raise MissingProgram("qboot.rom", "apt-get install qemu-system-data (Debian) or qboot (Ubuntu)")


async def find_version(program: str) -> str:
    """Its first line, without the copyright. Raises VmmError."""
    said = await process.run([program, "--version"], timeout_s=10)
    if said.status != 0 or not said.stdout:
        raise VmmError(f"{program} --version: {printable(said.stderr[-500:])}")
    return said.stdout.decode(errors="replace").splitlines()[0].removeprefix("QEMU emulator version ")


def find_user(accelerator: str) -> User:
    """Whom QEMU runs as: `husk-vm` where quickstart made it, else a number that is nobody's.

    The group of /dev/kvm comes along when that is what lets a user in (udev's rules do it so).
    """
    try:
        entry = pwd.getpwnam(USER)
        uid, gid = entry.pw_uid, entry.pw_gid
    except KeyError:
        uid = gid = FALLBACK_ID
    groups: tuple[int, ...] = ()
    if accelerator == "kvm" and (node := _kvm_node()) and node.st_gid and node.st_mode & 0o060 == 0o060:
        groups = (node.st_gid,)
    return User(uid=uid, gid=gid, groups=groups)


def _kvm_node() -> os.stat_result | None:
    try:
        node = Path("/dev/kvm").stat()
    except OSError:
        return None
    return node if stat.S_ISCHR(node.st_mode) else None


def _private_kvm(run_dir: Path, user: User) -> dict[str, str]:
    """A /dev/kvm of QEMU's own where the host's is for root alone, instead of loosening that one.

    It is a node in the pod's directory that QEMU's user owns, bound over /dev/kvm in a mount
    namespace that only QEMU has. Removed with the directory.
    """
    node = _kvm_node()
    if node is None:
        raise VmmError("the accelerator is kvm and there is no /dev/kvm")
    if node.st_mode & 0o006 == 0o006 or node.st_gid in user.groups:
        return {}
    mine = run_dir / "kvm"
    with contextlib.suppress(FileNotFoundError):
        mine.unlink()
    os.mknod(mine, stat.S_IFCHR | 0o600, node.st_rdev)
    os.chown(mine, user.uid, user.gid)
    return {"/dev/kvm": str(mine)}


# ----------------------------------------------------------------------------------- starting

_LOG_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC


def _keep(held: contextlib.ExitStack, fd: int) -> int:
    held.callback(os.close, fd)
    return fd


def _open_files(spec: VmSpec, taps: tuple[int, ...], held: contextlib.ExitStack) -> Fds:
    run_dir = Path(spec.run_dir)

    def listening(name: str) -> int:
        return held.enter_context(sockets.listen(run_dir / name)).fileno()

    def readable(path: str, what: str) -> int:
        try:
            return _keep(held, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise MissingProgram(f"{what} ({path or 'none is configured'})", "husk guest build") from error

    kernel = readable(spec.kernel, "guest kernel")
    if os.pread(kernel, 4, 0) != b"\x7fELF":
        # QEMU would take it for a boot sector of 1991 and run it
        raise VmmError(f"{spec.kernel} is not an ELF kernel (vmlinux); husk guest build makes one")
    return Fds(
        kernel=kernel,
        initramfs=readable(spec.initramfs, "guest initramfs"),
        monitor=listening("qmp.sock"),
        console=listening("console.sock"),
        channel=listening("agent.sock"),
        shares={},
        nics=tuple(NicFds(tap=tap, vhost=_open_vhost(held)) for tap in taps),
    )


def _open_vhost(held: contextlib.ExitStack) -> int:
    try:
        return _keep(held, os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return -1


def _with_shares(fds: Fds, connections: Mapping[str, int]) -> Fds:
    return Fds(
        kernel=fds.kernel,
        initramfs=fds.initramfs,
        monitor=fds.monitor,
        console=fds.console,
        channel=fds.channel,
        shares=connections,
        nics=fds.nics,
    )


async def _launch(program: str, spec: VmSpec, fds: Fds, log: int) -> ProcessIdentity:
    launch = plan(program, spec, fds)
    user = find_user(spec.accelerator)
    try:
        binds = _private_kvm(Path(spec.run_dir), user) if spec.accelerator == "kvm" else {}
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


async def _until_it_answers(
    run_dir: Path, vmm: ProcessIdentity, helpers: Mapping[str, ProcessIdentity]
) -> None:
    """QEMU greets on its monitor when all devices are made; if it ends before, it has said why."""
    greeting = asyncio.create_task(_greeting(run_dir / "qmp.sock"))
    ends = {"QEMU": asyncio.create_task(process.wait_exit(vmm))}
    ends |= {f"virtiofsd for {tag}": asyncio.create_task(process.wait_exit(h)) for tag, h in helpers.items()}
    try:
        await asyncio.wait(
            {greeting, *ends.values()}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if greeting.done() and greeting.result() and not any(end.done() for end in ends.values()):
            return
        if not greeting.done() and not any(end.done() for end in ends.values()):
            raise VmmError(f"QEMU was not ready within {START_TIMEOUT_S:g} s{_said(run_dir)}")
        # One end brings the others about: wait for them, so that what is told is the whole story.
        await asyncio.wait(ends.values(), timeout=0.5)
        ended = [f"{name} (status {end.result()})" for name, end in ends.items() if end.done()]
        raise VmmError(f"ended while starting: {', '.join(ended) or 'monitor'}{_said(run_dir)}")
    finally:
        await _cancel([greeting, *ends.values()])


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    waiting = list(tasks)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def _greeting(path: Path) -> bytes:
    loop = asyncio.get_running_loop()
    with sockets.connect(path) as connection:
        try:
            return await loop.sock_recv(connection, 4096)
        except ConnectionResetError:
            return b""


async def _kill_all(identities: list[ProcessIdentity]) -> None:
    """Kill them all before waiting for any. Raises the first failure once all have been tried."""
    results = await asyncio.gather(*(process.kill(i) for i in identities), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


# --------------------------------------------------------------------------------- what was said


def _said(run_dir: Path) -> str:
    """The end of what QEMU and its helpers wrote, as the tail of a message."""
    try:
        said = printable((run_dir / "qemu.log").read_bytes()[-4096:])
    except OSError:
        return ""
    return f": {said}" if said else ""


async def _keep_short(log: Path) -> None:
    """A guest can make QEMU complain without end. It writes at the end, so cutting is safe."""
    while True:
        await asyncio.sleep(30)
        with contextlib.suppress(OSError):
            _cut(log)


def _cut(log: Path) -> None:
    if log.stat().st_size > LOG_LIMIT:
        os.truncate(log, 0)
