"""AppArmor policy for tests, compiled by Debian's apparmor_parser, which needs no AppArmor in the kernel."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from sandbox.guest_image.apparmor import PACKAGE, PROGRAM, compile_policy
from tests.kit.debian import unpacked
from tests.kit.scratch import scratch_dir


def parser() -> Path:
    """Return apparmor_parser, unpacked from its Debian package."""
    tree = unpacked(PACKAGE)
    found = shutil.which(PROGRAM, path=f"{tree}/usr/sbin:{tree}/sbin")
    assert found, f"{PACKAGE} holds no {PROGRAM}"
    return Path(found)


def profile(name: str, *rules: str) -> str:
    """Return the text of a profile that allows everything except what the rules deny."""
    lines = ["file", "network", "capability", "mount", "umount", "ptrace", "signal", *rules]
    body = "".join(f"  {line},\n" for line in lines)
    return f"profile {name} flags=(attach_disconnected, mediate_deleted) {{\n{body}}}\n"


def compiled(text: str) -> bytes:
    """Compile the text of a profile."""
    return asyncio.run(compile_policy(parser(), text, scratch_dir("apparmor")))
