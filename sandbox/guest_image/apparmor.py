"""Compiles AppArmor's RuntimeDefault profile with apparmor_parser(8), also where the host has no AppArmor.

FEATURES restricts what the policy may use, in the form that apparmor_parser reads and the kernel writes
(/sys/kernel/security/apparmor/features): what all kernels since 5.9 have, so that any guest can load it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sandbox import capabilities
from sandbox.apparmor.profile import PROFILE
from sandbox.errors import MissingProgram
from sandbox.guest_image.packages import (
    BuildFailed,
    Progress,
    checked,
    download,
    field,
    need_apt,
    show,
    unpack,
)

PACKAGE = "apparmor"
PROGRAM = "apparmor_parser"
WHERE = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin"

_FAMILIES = """
unspec unix inet ax25 ipx appletalk netrom bridge atmpvc x25 inet6 rose netbeui security key netlink packet
ash econet atmsvc rds sna irda pppox wanpipe llc ib mpls can tipc bluetooth iucv rxrpc isdn phonet ieee802154
caif alg nfc vsock kcm qipcrtr smc xdp
"""
# AppArmor's own names, two of them for signals that no architecture of ours has
_SIGNALS = """
hup int quit ill trap abrt bus fpe kill usr1 segv usr2 pipe alrm term stkflt chld cont stop stp ttin ttou urg
xcpu xfsz vtalrm prof winch io pwr sys emt lost
"""
FEATURES = f"""\
policy {{set_load {{yes
}}
versions {{v5 {{yes
}}
v6 {{yes
}}
v7 {{yes
}}
v8 {{yes
}}
}}
}}
domain {{change_onexec {{yes
}}
change_profile {{yes
}}
stack {{yes
}}
version {{1.2
}}
}}
file {{mask {{create read write exec append mmap_exec link lock
}}
}}
mount {{mask {{mount umount pivot_root
}}
}}
ptrace {{mask {{read trace
}}
}}
caps {{mask {{{" ".join(capabilities.NAMES).lower()}
}}
}}
network_v8 {{af_mask {{{" ".join(_FAMILIES.split())}
}}
}}
signal {{mask {{{" ".join(_SIGNALS.split())}
}}
}}
"""


async def compile_default(parser: Path | None, packages: Path, scratch: Path, progress: Progress) -> bytes:
    """Compile the RuntimeDefault profile with `parser`, the installed one, or that of the distribution's
    package.

    Returns the policy; empty when there is no parser: containers that request the profile are refused then.
    Raises BuildFailed when the compilation fails.
    """
    try:
        parser = parser or await find_parser(packages, scratch, progress)
    except (BuildFailed, MissingProgram) as error:
        progress(f"AppArmor's RuntimeDefault will be rejected, as {PROGRAM} was not found: {error}")
        return b""
    return await compile_policy(parser, PROFILE, scratch)


async def find_parser(packages: Path, scratch: Path, progress: Progress) -> Path:
    """Find the installed parser, or unpack the distribution's package to `scratch`.

    Raises BuildFailed, MissingProgram.
    """
    if installed := shutil.which(PROGRAM, path=WHERE):
        return Path(installed)
    need_apt(f"{PROGRAM} in {WHERE}")
    version = field(await show(PACKAGE), "Version")
    if not version:
        raise BuildFailed("apt-cache show", f"{PACKAGE} is not known; run apt-get update")
    tree = scratch / PACKAGE
    await unpack(await download(packages, PACKAGE, version, progress), tree)
    program = shutil.which(PROGRAM, path=f"{tree}/usr/sbin:{tree}/sbin")
    if program is None:
        raise BuildFailed(PACKAGE, f"its package holds no {PROGRAM}")
    return Path(program)


async def compile_policy(parser: Path, text: str, scratch: Path) -> bytes:
    """Compile a profile's text to the binary policy that a kernel loads. Raises BuildFailed."""
    files = {name: scratch / f"apparmor.{name}" for name in ("features", "profile", "policy")}
    files["features"].write_text(FEATURES)
    files["profile"].write_text(text)
    options = ["--config-file", "/dev/null", "--quiet", "--skip-kernel-load", "--skip-cache"]
    names = [
        "--features-file",
        str(files["features"]),
        "--ofile",
        str(files["policy"]),
        str(files["profile"]),
    ]
    await checked([str(parser), *options, *names], timeout_s=60)
    return files["policy"].read_bytes()
