"""What QEMU needs of the host: its program, its firmware, whom it runs as, and /dev/kvm.

It runs as the user `husk-vm`, or without such a user under a number of its own that no distribution
gives out, so that neither files nor processes of anybody are within its reach.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import stat
from pathlib import Path

from sandbox.errors import MissingProgram, VmmError
from sandbox.host import process
from sandbox.host.process import User
from sandbox.vmm.console import printable

PROGRAM = "qemu-system-x86_64"
PACKAGE = "apt-get install qemu-system-x86"
USER = "husk-vm"
FALLBACK_ID = 60606  # in a range that no distribution assigns: systemd, "Users, Groups, UIDs and GIDs"
FIRMWARE = ("/usr/share/qemu/qboot.rom", "/usr/share/qboot/qboot.rom", "/usr/local/share/qemu/qboot.rom")


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


def private_kvm(run_dir: Path, user: User) -> dict[str, str]:
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
