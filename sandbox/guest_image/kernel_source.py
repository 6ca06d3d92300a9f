"""A small kernel for VMs, compiled here from the distribution's source package.

    ROOT/guest/kernels/KEY/
      vmlinux                             what QEMU boots, stripped
      config                              the complete configuration that it was compiled with
      modules/VERSION/modules.builtin     all that was wished for is in it; there are no modules

KEY is taken of what goes in: source package and its version, kernel.config (the options, and why), the
compiler, and the steps below. Same inputs, same bytes: time, user, host and path are kept out. A kernel
is compiled in the build's scratch directory and moved here when it is complete, so one that is here is
whole. The one before the last is kept, as for images.
"""

# ruff: noqa: ASYNC240 -- runs as a command of its own, with nothing else on its loop

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from sandbox.errors import MissingProgram, SandboxError
from sandbox.guest_image.packages import (
    BuildFailed,
    Progress,
    checked,
    download,
    field,
    hash_of,
    need_apt,
    show,
    unpack,
)
from sandbox.guest_image.vmlinux import Kernel
from sandbox.host import process

SOURCE = "linux-source"  # on Debian and Ubuntu: depends on the package with the version in its name
OPTIONS = Path(__file__).with_name("kernel.config")
COMPILE_TIMEOUT_S = 4 * 3600.0
# Only this build needs them, so no other check asks for them.
TOOLS = {
    "make": "make",
    "cc": "gcc libc6-dev",
    "ld": "binutils",
    "objcopy": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
}
ELF_HEADER = ("gelf.h", "libelf-dev")
# What the kernel's build would ask the machine for: kernel's Documentation/kbuild/reproducible-builds.rst
_FIXED = {
    "ARCH": "x86_64",
    "KBUILD_BUILD_HOST": "husk",
    "KBUILD_BUILD_USER": "husk",
    "KBUILD_BUILD_VERSION": "1",
    "TZ": "UTC",
}
_STRIP = ("objcopy", "--strip-all", "--remove-section=.comment")


class OptionsDropped(SandboxError):
    """The kernel's Kconfig did not take all of kernel.config: renamed, gone, or something it needs is off."""

    def __init__(self, options: tuple[str, ...]) -> None:
        super().__init__(f"the kernel's configuration does not take: {', '.join(options)}")
        self.options = options


# ------------------------------------------------------------------------------------- options


def find_options(text: str) -> list[tuple[str, ...]]:
    """The wishes of a fragment in its order, each with its alternatives: lines that "## or" joins."""
    wishes: list[tuple[str, ...]] = []
    joined = False
    for line in map(str.strip, text.splitlines()):
        if line == "## or":
            joined = True
        elif re.match(r"CONFIG_\w+=|# CONFIG_\w+ is not set$", line):
            before = wishes.pop() if joined else ()
            wishes.append((*before, line))
            joined = False
    return wishes


def find_dropped(text: str, config: str) -> tuple[str, ...]:
    """Wishes of the fragment that the configuration made of it does not fulfil.

    An option that is off is fulfilled too where the configuration does not mention it.
    """
    lines = set(config.splitlines())
    names = {line.partition("=")[0] for line in lines}

    def taken(wish: str) -> bool:
        return wish in lines or (wish.startswith("# ") and wish.split()[1] not in names)

    return tuple(" or ".join(wish) for wish in find_options(text) if not any(map(taken, wish)))


# ------------------------------------------------------------------------------------- the build


async def build_kernel(guest: Path, scratch: Path, progress: Progress, options: Path = OPTIONS) -> Kernel:
    """The kernel of the newest source package that apt knows, compiled unless it is there already.

    Raises MissingProgram, BuildFailed, OptionsDropped and OSError.
    """
    need_apt("husk guest build --kernel PATH")
    name, version = await find_source()
    kept = guest / "kernels" / await find_key(f"{name} {version}", options.read_bytes())
    if not kept.exists():
        await check_tools(scratch)
        package = await download(guest / "packages", name, version, progress)
        progress(f"unpacking {name} {version}")
        await unpack(package, scratch / "package")
        (archive,) = (p for p in (scratch / "package/usr/src").rglob("linux-source-*.tar.*") if p.is_file())
        made = await compile_kernel(archive, options, scratch, progress)
        kept.parent.mkdir(exist_ok=True)
        made.rename(kept)
        shutil.rmtree(scratch / "source")
    os.utime(kept)
    _sweep(kept)
    (modules,) = (kept / "modules").iterdir()
    return Kernel(image=kept / "vmlinux", modules=modules)


async def find_source() -> tuple[str, str]:
    """Name and version of the source package. Raises BuildFailed."""
    found = re.search(rf"\b({SOURCE}-\d[^\s,(]*)", field(await show(SOURCE), "Depends"))
    if found is None:
        raise BuildFailed("apt-cache show", f"{SOURCE} is not known; run apt-get update")
    return found[1], field(await show(found[1]), "Version")


async def find_key(source: str, options: bytes) -> str:
    """Raises MissingProgram where there is no compiler."""
    tools = []
    for program in ("cc", "ld"):
        if shutil.which(program) is None:
            raise MissingProgram(program, f"apt-get install {TOOLS[program]}")
        tools.append((await checked([program, "--version"], timeout_s=10)).splitlines()[0])
    return make_key(source, options, *tools)


def make_key(source: str, options: bytes, compiler: str, linker: str) -> str:
    steps = repr((sorted(_FIXED.items()), _STRIP))
    return hash_of(source.encode(), options, compiler.encode(), linker.encode(), steps.encode())


async def check_tools(scratch: Path) -> None:
    """Raises MissingProgram with everything that is missing."""
    missing = {tool: package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if "cc" not in missing:
        header, package = ELF_HEADER
        probe = scratch / "probe.c"
        probe.write_text(f"#include <{header}>\n")
        if (await process.run(["cc", "-E", "-o", os.devnull, str(probe)], timeout_s=30)).status != 0:
            missing[header] = package
    if missing:
        packages = " ".join(dict.fromkeys(missing.values()))
        raise MissingProgram(", ".join(missing), f"apt-get install {packages}")


async def compile_kernel(archive: Path, options: Path, scratch: Path, progress: Progress) -> Path:
    """Compile what the archive holds to scratch/kernel, laid out as in the module's docstring.

    Raises BuildFailed, and OptionsDropped before the long part begins.
    """
    source, made = scratch / "source", scratch / "kernel"
    source.mkdir()
    await checked(["tar", "-xf", str(archive), "-C", str(source), "--strip-components=1"], timeout_s=900)
    environment = find_environment(source)
    await _make(source, environment | {"KCONFIG_ALLCONFIG": str(options)}, "allnoconfig", timeout_s=600)
    config = (source / ".config").read_text()
    if dropped := find_dropped(options.read_text(), config):
        raise OptionsDropped(dropped)
    jobs = len(os.sched_getaffinity(0))
    progress(f"compiling the kernel with {jobs} jobs; two take about a quarter of an hour")
    await _make(source, environment, f"-j{jobs}", "vmlinux", timeout_s=COMPILE_TIMEOUT_S)
    version = (source / "include/config/kernel.release").read_text().strip()
    modules = made / "modules" / version
    modules.mkdir(parents=True)
    await checked([*_STRIP, str(source / "vmlinux"), str(made / "vmlinux")], timeout_s=300)
    (made / "config").write_text(config)
    shutil.copyfile(source / "modules.builtin", modules / "modules.builtin")
    return made


def find_environment(source: Path) -> dict[str, str]:
    """The build's date is the source's: of the Makefile, which says the version."""
    date = time.strftime("%Y-%m-%d", time.gmtime((source / "Makefile").stat().st_mtime))
    return {**_FIXED, "KBUILD_BUILD_TIMESTAMP": date}


async def _make(source: Path, environment: Mapping[str, str], *arguments: str, timeout_s: float) -> None:
    # a long build shall not hold up the pods that run beside it
    command = ["nice", "-n", "10", "make", "--silent", "-C", str(source), *arguments]
    await checked(command, timeout_s=timeout_s, environment=environment)


def _sweep(kept: Path) -> None:
    """Remove all kernels but this one and the one that was used before it."""
    others = sorted((d for d in kept.parent.iterdir() if d != kept), key=lambda d: d.stat().st_mtime)
    for directory in others[:-1]:
        shutil.rmtree(directory)
