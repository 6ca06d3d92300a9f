"""What QEMU needs of the host: its program, its firmware, the user that it runs as, and /dev/kvm.

It runs as the user `husk-vm`, or without such a user under a number that no distribution assigns, so
that it can reach neither files nor processes of anybody.

Accelerators: that /dev/kvm opens means little. On some hosts it creates a VM and then never runs a
guest's 64-bit code, or aborts over a register that KVM advertises and does not let QEMU set. Hence a
trial (`candidates`) with the default CPU model and with one that lacks that register, and TCG otherwise.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from sandbox.errors import InvalidSpec, MissingProgram, VmmError
from sandbox.host import findings, process
from sandbox.host.findings import Finding, HostCheck
from sandbox.host.process import Credentials
from sandbox.vmm import Candidate, virtiofsd
from sandbox.vmm.console import printable
from sandbox.vmm.qemu.argv import ACCELERATORS, check_settings

PROGRAM = "qemu-system-x86_64"
PACKAGE = "apt-get install qemu-system-x86"
USER = "husk-vm"
FALLBACK_ID = 60606  # in a range that no distribution assigns: systemd, "Users, Groups, UIDs and GIDs"
FIRMWARE = ("/usr/share/qemu/qboot.rom", "/usr/share/qboot/qboot.rom", "/usr/local/share/qemu/qboot.rom")
# The second is for hosts where KVM advertises IA32_ARCH_CAPABILITIES and does not let QEMU set it.
KVM_CPU_MODELS = ("", "host,-arch-capabilities")


class QemuHost:
    """QEMU's view of a machine: see `sandbox.vmm.Host`."""

    def __init__(self, fs: Path = Path("/")) -> None:
        self._fs = fs

    def check(self, accelerator: str, options: Mapping[str, str]) -> None:
        """See Host."""
        if accelerator == "auto":
            accelerator = ACCELERATORS[0]
        elif accelerator not in ACCELERATORS:
            raise InvalidSpec(
                "accelerator", f"{accelerator!r} is unknown", f"auto, {', '.join(ACCELERATORS)}"
            )
        check_settings(accelerator, options)

    async def version(self) -> str:
        """See Host."""
        return await find_version(find_program())

    def candidates(self) -> Sequence[Candidate]:
        """Return KVM with each CPU model, unless /dev/kvm rules it out, then TCG."""
        obstacle = find_obstacle(str(self._fs / "dev/kvm"))
        if obstacle is not None:
            return (Candidate(accelerator="tcg", reason=obstacle, trial=False),)
        kvm = (
            Candidate(accelerator="kvm", options={"cpu": model} if model else {}) for model in KVM_CPU_MODELS
        )
        return (
            *kvm,
            Candidate(accelerator="tcg", reason="/dev/kvm opens, but no guest runs under it", trial=False),
        )

    def checks(self) -> Sequence[HostCheck]:
        """See Host."""
        return (
            HostCheck("qemu", check_program),
            HostCheck("virtiofsd", check_virtiofsd),
            findings.device_check(
                self._fs / "dev/vhost-net",
                use="faster networking",
                missing=findings.warn(
                    "vhost-net", "/dev/vhost-net is missing: networking is slower", "modprobe vhost_net"
                ),
            ),
            findings.device_check(
                self._fs / "dev/vhost-vsock",
                use="may carry the guest channel",
                # nothing to fix: virtio-serial serves as well
                missing=findings.ok(
                    "vhost-vsock", "/dev/vhost-vsock is missing: virtio-serial is used, which does as well"
                ),
            ),
        )


# -------------------------------------------------------------------------------------- checks


async def check_program() -> Finding:
    """Find QEMU and its firmware."""
    try:
        program = find_program()
        find_firmware()
        version = await find_version(program)
    except MissingProgram as error:
        return findings.fail("qemu", str(error), error.package)
    return findings.ok("qemu", f"{version} ({program})")


async def check_virtiofsd() -> Finding:
    """Find a virtiofsd."""
    try:
        found = await virtiofsd.Prober().find()
    except MissingProgram as error:
        return findings.fail("virtiofsd", str(error), error.package)
    return findings.ok("virtiofsd", f"{found.version} ({found.path})")


def find_obstacle(device: str = "/dev/kvm") -> str | None:
    """Return what rules KVM out without a trial, in words; None: it takes a trial."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {device}"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return None


# ------------------------------------------------------------------------------------- programs


def find_program() -> str:
    """Return the path of QEMU. Raises MissingProgram."""
    found = shutil.which(PROGRAM, path=process.ENVIRONMENT["PATH"])
    if found is None:
        raise MissingProgram("QEMU", PACKAGE)
    return found


def find_firmware() -> str:
    """Return the path of qboot, a minimal firmware; QEMU finds it by its name. Raises MissingProgram."""
    for place in FIRMWARE:
        if os.access(place, os.R_OK):
            return place
    raise MissingProgram("qboot.rom", "apt-get install qemu-system-data (Debian) or qboot (Ubuntu)")


async def find_version(program: str) -> str:
    """Return the first line of `--version`, without the copyright. Raises VmmError, DeadlineExceeded."""
    completed = await process.run([program, "--version"], timeout_s=10)
    if completed.status != 0 or not completed.stdout:
        raise VmmError(f"{program} --version: {printable(completed.stderr[-500:])}")
    return completed.stdout.decode(errors="replace").splitlines()[0].removeprefix("QEMU emulator version ")


# ----------------------------------------------------------------------------------------- user


def find_user(accelerator: str) -> Credentials:
    """Return the user that QEMU runs as: `husk-vm` where quickstart made it, else an unassigned number.

    Under KVM the group of /dev/kvm is added where it may open the device (udev's rules make it so).
    """
    try:
        entry = pwd.getpwnam(USER)
        uid, gid = entry.pw_uid, entry.pw_gid
    except KeyError:
        uid = gid = FALLBACK_ID
    groups: tuple[int, ...] = ()
    if accelerator == "kvm" and (node := _kvm_node()) and node.st_gid and node.st_mode & 0o060 == 0o060:
        groups = (node.st_gid,)
    return Credentials(uid=uid, gid=gid, groups=groups)


def _kvm_node() -> os.stat_result | None:
    try:
        node = Path("/dev/kvm").stat()
    except OSError:
        return None
    return node if stat.S_ISCHR(node.st_mode) else None


def private_kvm(run_dir: Path, user: Credentials) -> dict[str, str]:
    """Make a /dev/kvm for this QEMU alone where the host's is restricted to root, instead of loosening that.

    It is a device node in the pod's directory, owned by QEMU's user. Returns the binds for
    `process.start`, which mounts it over /dev/kvm in a mount namespace that only this QEMU has; empty
    where the host's node is accessible. It is removed with the directory. Raises VmmError, OSError.
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
