"""Compiles a small kernel for VMs from the distribution's source package.

    ROOT/guest/kernels/KEY/
      vmlinux                             what QEMU boots, stripped
      config                              the complete configuration that it was compiled with
      modules/VERSION/modules.builtin     everything requested is built in; there are no modules

KEY is computed from the inputs: the source package and its version, kernel.config (the options, with
reasons), the compiler, and the steps below. The same inputs give the same bytes: time, user, host and path
are fixed. A kernel is compiled in the build's scratch directory and renamed when it is complete, so one that
exists here is complete. The one before the current one is kept, as for images.
"""

# ruff: noqa: ASYNC240 -- runs as a command, with nothing else on its event loop

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
# Needed by this build alone, so nothing else checks for them.
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
# What the build would else take from the machine: kernel's Documentation/kbuild/reproducible-builds.rst
_FIXED = {
    "ARCH": "x86_64",
    "KBUILD_BUILD_HOST": "husk",
    "KBUILD_BUILD_USER": "husk",
    "KBUILD_BUILD_VERSION": "1",
    "TZ": "UTC",
}
_STRIP = ("objcopy", "--strip-all", "--remove-section=.comment")


class OptionsDropped(SandboxError):
    """Kconfig did not accept all of kernel.config: an option is renamed, removed, or lacks a dependency."""

    def __init__(self, options: tuple[str, ...]) -> None:
        super().__init__(
            f"the kernel's Kconfig does not accept these options of kernel.config: {', '.join(options)}"
        )
        self.options = options


# ------------------------------------------------------------------------------------- options


def find_options(text: str) -> list[tuple[str, ...]]:
    """Parse a fragment's options in order, each with its alternatives: lines that "## or" joins."""
    options: list[tuple[str, ...]] = []
    joined = False
    for line in map(str.strip, text.splitlines()):
        if line == "## or":
            joined = True
        elif re.match(r"CONFIG_\w+=|# CONFIG_\w+ is not set$", line):
            before = options.pop() if joined else ()
            options.append((*before, line))
            joined = False
    return options


def find_dropped(text: str, config: str) -> tuple[str, ...]:
    """List the options of the fragment that the resulting configuration does not have.

    An option that is to be off may also be absent from the configuration.
    """
    lines = set(config.splitlines())
    names = {line.partition("=")[0] for line in lines}

    def is_set(option: str) -> bool:
        return option in lines or (option.startswith("# ") and option.split()[1] not in names)

    return tuple(" or ".join(each) for each in find_options(text) if not any(map(is_set, each)))


# ------------------------------------------------------------------------------------- the build


async def build_kernel(guest: Path, scratch: Path, progress: Progress, options: Path = OPTIONS) -> Kernel:
    """Compile the newest source package that apt knows, unless that kernel exists already.

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
    """Find the name and version of the source package. Raises BuildFailed."""
    found = re.search(rf"\b({SOURCE}-\d[^\s,(]*)", field(await show(SOURCE), "Depends"))
    if found is None:
        raise BuildFailed("apt-cache show", f"{SOURCE} is not known; run apt-get update")
    return found[1], field(await show(found[1]), "Version")


async def find_key(source: str, options: bytes) -> str:
    """Compute KEY with this host's compiler and linker. Raises MissingProgram where there is none."""
    tools = []
    for program in ("cc", "ld"):
        if shutil.which(program) is None:
            raise MissingProgram(program, f"apt-get install {TOOLS[program]}")
        tools.append((await checked([program, "--version"], timeout_s=10)).splitlines()[0])
    return make_key(source, options, *tools)


def make_key(source: str, options: bytes, compiler: str, linker: str) -> str:
    """Compute KEY from the inputs of a build and its steps."""
    steps = repr((sorted(_FIXED.items()), _STRIP))
    return hash_of(source.encode(), options, compiler.encode(), linker.encode(), steps.encode())


async def check_tools(scratch: Path) -> None:
    """Raise MissingProgram with all tools and headers that are missing, and the packages that have them."""
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
    """Compile a source archive to scratch/kernel, with the layout of the module's docstring.

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
    """Return the variables of a reproducible build. Its date is the source's: that of the Makefile."""
    date = time.strftime("%Y-%m-%d", time.gmtime((source / "Makefile").stat().st_mtime))
    return {**_FIXED, "KBUILD_BUILD_TIMESTAMP": date}


async def _make(source: Path, environment: Mapping[str, str], *arguments: str, timeout_s: float) -> None:
    # nice: a long build must not slow the pods that run at the same time
    command = ["nice", "-n", "10", "make", "--silent", "-C", str(source), *arguments]
    await checked(command, timeout_s=timeout_s, environment=environment)


def _sweep(kept: Path) -> None:
    """Remove all kernels but this one and the one that was used before it."""
    others = sorted((d for d in kept.parent.iterdir() if d != kept), key=lambda d: d.stat().st_mtime)
    for directory in others[:-1]:
        shutil.rmtree(directory)
