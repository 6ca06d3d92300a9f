"""The driver: the agent in its standalone mode, shares as bind mounts, NICs as taps in its namespace.

    RUN_DIR/agent.sock     guest channel, bound by the agent
    RUN_DIR/console.log    output of the guest: of the agent, and of the program that starts it
    CGROUP2/husk-process-POD   the agent's cgroup, in the first cgroup v2 mount of the host

VmSpec.kernel is the program that becomes the agent: the agent itself, or a script that execs it with the
arguments it gets. It runs in a time namespace whose monotonic clock starts at zero, as a VM's
does (clock.py).

    unshare            VmHandle.vmm: the process whose end is the end of the VM
      husk-agent       "init" of VmHandle.helpers: PID 1 of a namespace, so that all ends with it
        husk-agent     "agent" of the helpers: PID 1 of the namespace of the containers
    wire.py            "net0" of the helpers: copies packets between the tap of the pod's network
                       namespace and one in the agent's

Crash story: processes are found by the pod id and the run directory, which are among their arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import struct
import sys
import time
from collections.abc import Collection
from pathlib import Path

from sandbox.errors import InvalidSpec, MissingProgram, VmmError, VmmGone
from sandbox.host import mount_flags, mounts, process, syscalls, threads
from sandbox.host.process import ProcessIdentity
from sandbox.vmm import Feature, Machine, NicSpec, ShareSpec, Unsupported, VmHandle, VmSpec
from tests.drivers.process.host import ProcessHost
from tests.drivers.process.machine import ProcessMachine, log_tail

NAME = "process"
START_TIMEOUT_S = 20.0
GUEST_SHARES = "/run/husk"  # where the daemon asks the agent to mount the share of a tag
CLOCK = Path(__file__).with_name("clock.py")
WIRE = Path(__file__).with_name("wire.py")
TUNSETIFF, TUNSETPERSIST, TUNGETIFF = 0x400454CA, 0x400454CB, 0x800454D2
SIOCSIFHWADDR, ARPHRD_ETHER = 0x8924, 1
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000


class ProcessDriver:
    """See `sandbox.vmm.Hypervisor`. It keeps no state."""

    def features(self, spec: VmSpec) -> Collection[Feature]:
        """See Hypervisor: none."""
        return frozenset()

    async def fingerprint(self, spec: VmSpec) -> str:
        """See Hypervisor. There are no templates, and so nothing else depends on it."""
        found = await asyncio.to_thread(_stat, spec.kernel)
        facts = (spec.kernel, found.st_ino, found.st_size, found.st_mtime_ns, spec.accelerator)
        size = (spec.memory_mib, spec.vcpus, spec.max_nics)
        return hashlib.sha256(repr((facts, size)).encode()).hexdigest()[:32]

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
        """See Hypervisor."""
        _check(spec)
        run_dir = Path(spec.run_dir)
        try:
            vmm = await _launch(spec)
            init, agent = await _wait_for_agent(spec, vmm)
            helpers = {"init": init, "agent": agent}
            for number, (nic, tap) in enumerate(zip(spec.nics, taps, strict=True)):
                wire = await _connect_nic(spec, agent, vmm, number, nic, tap)
                helpers |= {f"net{number}": wire} if wire else {}
            for share in spec.shares:
                await asyncio.to_thread(_mount_share, agent, share)
        except OSError as error:
            await self.destroy(spec.pod_id, run_dir)
            raise VmmError(f"the guest could not be started: {error}") from error
        except BaseException:
            await self.destroy(spec.pod_id, run_dir)
            raise
        return ProcessMachine(
            VmHandle(
                hypervisor=NAME,
                spec=spec,
                vmm=vmm,
                helpers=helpers,
                channel=f"unix:{run_dir / 'agent.sock'}",
            )
        )

    async def attach(self, handle: VmHandle) -> Machine:
        """See Hypervisor."""
        if not process.alive(handle.vmm):
            raise VmmGone(f"process {handle.vmm.pid} has exited{log_tail(Path(handle.spec.run_dir))}")
        return ProcessMachine(handle)

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        """See Hypervisor."""
        while found := await asyncio.to_thread(process.find_by_argument, *_names(pod_id, run_dir)):
            await asyncio.gather(*(process.kill(each) for each in found))
        await asyncio.to_thread(_remove_cgroup, _cgroup_of(pod_id))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (run_dir / "agent.sock").unlink()


def _names(pod_id: str, run_dir: Path) -> tuple[str, str]:
    return f"husk-{pod_id}", f"{run_dir}/"


def _check(spec: VmSpec) -> None:
    ProcessHost().check(spec.accelerator, spec.options)
    if spec.accelerator == "auto":
        raise InvalidSpec("accelerator", "'auto' has to be decided before")
    if spec.savable or spec.template:
        raise Unsupported(NAME, Feature.SAVE)
    _stat(spec.kernel)
    with Path(spec.kernel).open("rb") as program:
        if program.read(4)[:2] not in (b"\x7fE", b"#!"):
            raise VmmError(f"{spec.kernel} cannot be run in place of a kernel")


def _stat(path: str) -> os.stat_result:
    try:
        return Path(path).stat()
    except OSError as error:
        raise MissingProgram(f"guest agent ({path})", "husk guest build") from error


# -------------------------------------------------------------------------------------- starting


async def _launch(spec: VmSpec) -> ProcessIdentity:
    cgroup, run_dir = _cgroup_of(spec.pod_id), Path(spec.run_dir)
    await asyncio.to_thread(cgroup.mkdir, exist_ok=True)
    # sockets have short names: the agent binds its own in its current directory
    agent = f'cd "$1" && exec "$2" --listen unix:agent.sock --cgroup {cgroup} --lenient-cgroup "$@"'
    clock = [sys.executable, "-I", "-S", str(CLOCK)]
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--"]
    shell = ["/bin/sh", "-c", agent, "husk-guest", f"{run_dir}/", spec.kernel]
    log = os.open(run_dir / "console.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return await process.start(
            [*clock, *unshare, *shell, *_names(spec.pod_id, run_dir)],
            cgroups=spec.cgroups,
            netns=spec.netns,
            stdout=log,
            stderr=log,
        )
    finally:
        os.close(log)


async def _wait_for_agent(spec: VmSpec, vmm: ProcessIdentity) -> tuple[ProcessIdentity, ProcessIdentity]:
    """Return the PIDs 1 of both namespaces, once those of the agent are complete. Raises VmmError."""
    run_dir, deadline = Path(spec.run_dir), time.monotonic() + START_TIMEOUT_S
    while process.alive(vmm) and time.monotonic() < deadline:
        for child in _children(vmm.pid):
            for pid in _children(child):
                if Path(f"/proc/{pid}/root/run/husk/files").exists() and (run_dir / "agent.sock").exists():
                    init, agent = process.identify(child), process.identify(pid)
                    if init is not None and agent is not None:
                        return init, agent
        await asyncio.sleep(0.005)
    raise VmmError(f"the guest exited or did not start in {START_TIMEOUT_S:g} s{log_tail(run_dir)}")


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _mount_share(agent: ProcessIdentity, share: ShareSpec) -> None:
    """Mount a share where the agent would, which then leaves it alone. What the host mounts below it later
    propagates to it."""
    target = Path(GUEST_SHARES) / share.tag
    namespace = os.open(f"/proc/{agent.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    source = os.open(share.source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        tree = mounts.clone_tree(source, target)
        try:
            mounts.set_tree_attributes(tree, target, propagation=mount_flags.MS_SLAVE)
            mounts.in_namespace(namespace, lambda: _attach(tree, target))
        finally:
            os.close(tree)
    finally:
        os.close(source)
        os.close(namespace)


def _attach(tree: int, target: Path) -> None:
    target.mkdir(mode=0o755, exist_ok=True)
    point = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mounts.attach_tree(tree, point, target)
    finally:
        os.close(point)


# --------------------------------------------------------------------------------------- network


async def _connect_nic(
    spec: VmSpec, agent: ProcessIdentity, vmm: ProcessIdentity, number: int, nic: NicSpec, tap: int
) -> ProcessIdentity | None:
    """Make an interface with this MAC in the agent's namespace, and connect it to the tap.

    A descriptor that is not a tap, as fakes of the network have it, leaves it unconnected: None.
    """
    flags = _tap_flags(tap)
    inner = await asyncio.to_thread(_make_tap, agent, f"tap{number}", nic.mac, flags or IFF_TAP | IFF_NO_PI)
    try:
        if flags is None:
            return None
        return await process.start(
            [
                sys.executable,
                str(WIRE),
                str(tap),
                str(inner),
                str(vmm.pid),
                *_names(spec.pod_id, Path(spec.run_dir)),
            ],
            cgroups=spec.cgroups,
            netns=spec.netns,
            pass_fds=(tap, inner),
        )
    finally:
        os.close(inner)


def _tap_flags(tap: int) -> int | None:
    request = bytearray(40)
    try:
        fcntl.ioctl(tap, TUNGETIFF, request)
    except OSError:
        return None
    (flags,) = struct.unpack_from("H", request, 16)
    return int(flags) & (IFF_TAP | IFF_NO_PI | 0x4000)


def _make_tap(agent: ProcessIdentity, name: str, mac: str, flags: int) -> int:
    """Make a persistent tap in the agent's network namespace; the caller owns the descriptor."""
    namespace = Path(f"/proc/{agent.pid}/ns/net")
    return threads.call_in_namespace(
        namespace, syscalls.CLONE_NEWNET, lambda: _open_tap(name, mac, flags), "husk-tap"
    )


def _open_tap(name: str, mac: str, flags: int) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(tap, TUNSETPERSIST, 1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
            address = bytes.fromhex(mac.replace(":", ""))
            request = struct.pack("16sH6s16x", name.encode(), ARPHRD_ETHER, address)
            fcntl.ioctl(any_socket, SIOCSIFHWADDR, request)
    except BaseException:
        os.close(tap)
        raise
    return tap


# --------------------------------------------------------------------------------------- cgroups


def _cgroup_of(pod_id: str) -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path) / f"husk-process-{pod_id}"
    raise VmmError("this driver needs a mount of cgroup v2")


def _remove_cgroup(cgroup: Path) -> None:
    """The kernel refuses with EBUSY until the last process was reaped."""
    for _ in range(1000):
        try:
            for directory in sorted(cgroup.rglob("*/"), reverse=True):
                directory.rmdir()
            cgroup.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        time.sleep(0.005)
    raise VmmError(f"{cgroup} is busy")
