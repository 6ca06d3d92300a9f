"""Compiles husk_acl.c, a module for the distribution's kernel that makes ACLs count on volumes.

The kernel's headers are packages of the same version, unpacked and not installed. What is compiled is kept:

    ROOT/guest/acl/KEY.ko    KEY is a hash of the kernel's version, the source and the compiler
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from sandbox.errors import MissingProgram
from sandbox.guest_image.packages import (
    BuildFailed,
    Progress,
    checked,
    download,
    field,
    hash_of,
    show,
    unpack,
)
from sandbox.vm_pods.boot_image import ACL_MODULE

SOURCE = Path(__file__).with_name(f"{ACL_MODULE}.c")
HEADERS = re.compile(r"\b(linux-(?:headers|kbuild)-[^\s,(]*)")
# debugging information and the build id, both of which depend on where it was compiled
_STRIP = ("strip", "--strip-debug", "--remove-section=.note.gnu.build-id")


async def compile_module(kernel: str, guest: Path, scratch: Path, progress: Progress) -> Path | None:
    """Compile the module for the distribution's kernel of this release, unless that has been done.

    Returns None where it cannot be compiled: ACLs are not enforced on volumes then.
    """
    try:
        return await _compile_once(kernel, guest, scratch, progress)
    except (BuildFailed, MissingProgram) as error:
        progress(f"ACLs will not be enforced on volumes, as {SOURCE.name} could not be compiled: {error}")
        return None


async def _compile_once(kernel: str, guest: Path, scratch: Path, progress: Progress) -> Path:
    for program, package in (("make", "make"), ("cc", "gcc"), ("strip", "binutils")):
        if shutil.which(program) is None:
            raise MissingProgram(program, f"apt-get install {package}")
    name = f"linux-headers-{kernel}"
    shown = await show(name)
    if not shown:
        raise BuildFailed("apt-cache show", f"{name} is not known; run apt-get update")
    compiler = (await checked(["cc", "--version"], timeout_s=10)).splitlines()[0]
    version = field(shown, "Version")
    key = hash_of(kernel.encode(), version.encode(), SOURCE.read_bytes(), compiler.encode())
    kept = guest / "acl" / f"{key}.ko"
    if not kept.exists():
        progress(f"compiling {SOURCE.name}")
        tree = await _unpack_headers(name, shown, scratch, progress)
        made = await _compile(tree / "usr/src" / name, scratch)
        kept.parent.mkdir(exist_ok=True)
        made.rename(kept)
    for other in kept.parent.iterdir():
        if other != kept:
            other.unlink()
    return kept


async def _unpack_headers(name: str, shown: str, scratch: Path, progress: Progress) -> Path:
    """Unpack the headers' package, and those of the same source that it depends on."""
    tree = scratch / "headers"
    wanted = {name: field(shown, "Version")}
    for other in HEADERS.findall(field(shown, "Depends")):
        wanted[other] = field(await show(other), "Version")
    for each, version in wanted.items():
        # a directory for each: an older version is recognised by the beginning of its name
        await unpack(await download(scratch / f"{each}.deb", each, version, progress), tree)
    for makefile in tree.glob("usr/src/*/Makefile"):
        makefile.write_text(makefile.read_text().replace(" /usr/src/", f" {tree}/usr/src/"))
    return tree


async def _compile(headers: Path, scratch: Path) -> Path:
    source = scratch / ACL_MODULE
    source.mkdir()
    shutil.copy(SOURCE, source)
    (source / "Kbuild").write_text(f"obj-m := {ACL_MODULE}.o\n")
    # without type information, for which newer kernels need another program (pahole)
    options = [f"M={source}", "CONFIG_DEBUG_INFO_BTF_MODULES="]
    await checked(["make", "--silent", "-C", str(headers), *options, "modules"], timeout_s=300)
    module = source / f"{ACL_MODULE}.ko"
    await checked([*_STRIP, str(module)], timeout_s=60)
    return module
