"""Converts a distribution's kernel package to what a VM boots: a plain vmlinux and plain modules.

A bzImage contains the kernel compressed. Extracted beforehand, QEMU enters it directly (PVH), and no guest
spends its start on decompression. Modules are decompressed to `.ko` for the same reason, and ordered so that
each follows those that it depends on.
"""

from __future__ import annotations

import ctypes
import gzip
import lzma
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import zstandard

from sandbox.errors import MissingProgram, SandboxError

MAX_KERNEL = 512 << 20
_SIGNED = b"~Module signature appended~\n"
_LZ4_BLOCK = 8 << 20  # of the legacy format: lz4, doc/lz4_Frame_format.md, "Legacy frame"


class BadKernel(SandboxError):
    """The kernel image or its modules cannot be used."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(f"{what}: {problem}")
        self.what = what
        self.problem = problem


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel image (bzImage or ELF) and its /lib/modules/VERSION.

    `keep_signatures` keeps those of modules, where it is unknown whether the kernel requires them. `acls` is
    our module for it, see `acl_module`.
    """

    image: Path
    modules: Path
    keep_signatures: bool = True
    acls: Path | None = None

    @property
    def version(self) -> str:
        """The release, as uname -r prints it."""
        return self.modules.name


def extract_vmlinux(image: bytes, name: str = "kernel") -> bytes:
    """Extract the ELF kernel from a bzImage; an ELF file is returned as it is. `name` is used in errors.

    Header fields as in the kernel's Documentation/arch/x86/boot.rst: setup_sects at 0x1f1, magic
    "HdrS" at 0x202, version at 0x206, payload_offset and payload_length (since 2.08) at 0x248.
    Raises BadKernel.
    """
    if image[:4] == b"\x7fELF":
        return image
    if len(image) < 0x260 or image[0x202:0x206] != b"HdrS":
        raise BadKernel(name, "neither an ELF file nor a bzImage")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x208:
        raise BadKernel(name, f"boot protocol {version:#x} is too old: it has no payload offset (2.08 has)")
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    vmlinux = decompress(image[start : start + length], name)
    if vmlinux[:4] != b"\x7fELF":
        raise BadKernel(name, "its payload is not an ELF file")
    return vmlinux


def decompress(data: bytes, name: str) -> bytes:
    """Decompress gzip, xz, lzma, zstd or legacy lz4, recognized by magic number; ELF is returned as it is.

    A kernel's payload has its uncompressed size appended, which the decompressors ignore. Raises BadKernel,
    and MissingProgram where the lz4 library is not installed.
    """
    try:
        if data[:2] == b"\x1f\x8b":
            return zlib.decompressobj(wbits=31).decompress(data, MAX_KERNEL)
        if data[:6] == b"\xfd7zXZ\x00":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data, MAX_KERNEL)
        if data[:3] == b"\x5d\x00\x00":
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data, MAX_KERNEL)
        if data[:4] == b"\x28\xb5\x2f\xfd":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise BadKernel(name, f"cannot be decompressed: {error}") from error
    if data[:4] == b"\x02\x21\x4c\x18":
        return _unpack_lz4(data, name)
    if data[:4] == b"\x7fELF":
        return data
    raise BadKernel(name, f"unknown compression with magic number {data[:6].hex()}")


def _unpack_lz4(data: bytes, name: str) -> bytes:
    try:
        library = ctypes.CDLL("liblz4.so.1")
    except OSError as error:
        raise MissingProgram("liblz4.so.1", "apt-get install liblz4-1") from error
    block = ctypes.create_string_buffer(_LZ4_BLOCK)
    unpacked = bytearray()
    at = 4
    while at + 4 < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if size > len(data) - at or len(unpacked) > MAX_KERNEL:
            raise BadKernel(name, "its lz4 data is truncated")
        got = library.LZ4_decompress_safe(data[at : at + size], block, size, _LZ4_BLOCK)
        if got < 0:
            raise BadKernel(name, "its lz4 data is corrupt")
        unpacked += memoryview(block)[:got]
        at += size
    return bytes(unpacked)


# -------------------------------------------------------------------------------------- modules


def find_modules(directory: Path) -> dict[str, Path]:
    """Find the module files below /lib/modules/VERSION, by name with underscores in place of dashes."""
    found = {}
    for path in sorted((directory / "kernel").rglob("*.ko*")):
        found[path.name.split(".ko")[0].replace("-", "_")] = path
    return found


def load_modules(
    available: Mapping[str, Path],
    builtin: Iterable[str],
    wanted: Iterable[str],
    *,
    keep_signatures: bool = True,
) -> dict[str, bytes]:
    """Read the wanted modules and their dependencies, decompressed, each after its dependencies.

    What is built into the kernel is left out. Dependencies are read from the modules themselves, as a package
    contains no modules.dep: depmod creates it at installation. Raises BadKernel for a missing module.
    """
    inside = set(builtin)
    loaded: dict[str, bytes] = {}

    def load(name: str, chain: tuple[str, ...]) -> None:
        if name in loaded or name in inside:
            return
        if name not in available or name in chain:
            needed = f" (needed by {chain[-1]})" if chain else ""
            raise BadKernel(f"module {name}{needed}", "the kernel's package does not have it")
        content = decompress(available[name].read_bytes(), f"module {name}")
        for dependency in find_dependencies(content):
            load(dependency, (*chain, name))
        loaded[name] = content if keep_signatures else cut_signature(content)

    for name in wanted:
        load(name, ())
    return loaded


def find_dependencies(module: bytes) -> list[str]:
    """Read `depends=` of a module's .modinfo section (NUL-terminated strings): names separated by commas."""
    at = module.find(b"\0depends=")
    if at < 0:
        return []
    text = module[at + 9 : module.index(b"\0", at + 9)].decode()
    return [name.replace("-", "_") for name in text.split(",") if name]


def find_aliases(module: bytes) -> list[str]:
    """Read the other names by which a kernel requests a module, without the patterns that match hardware."""
    names = (each.decode() for each in re.findall(rb"\0alias=([^\0]+)", module))
    return [name for name in names if not set(name) & set("*?[/")]


def cut_signature(module: bytes) -> bytes:
    """Remove a module's signature: the host provides the initramfs, and verification would slow each start.

    The signature is followed by struct module_signature, whose last four bytes of twelve are the length
    (big-endian), and a line of text: kernel's include/linux/module_signature.h.
    """
    body = module.removesuffix(_SIGNED)
    if body == module or len(body) < 12:
        return module
    (length,) = struct.unpack(">I", body[-4:])
    return body[: len(body) - 12 - length] if length <= len(body) - 12 else module


def read_builtin(directory: Path) -> list[str]:
    """Read the names of built-in modules from modules.builtin (kernel's Documentation/kbuild/kbuild.rst)."""
    lines = (directory / "modules.builtin").read_text().split()
    return [Path(line).name.removesuffix(".ko").replace("-", "_") for line in lines]
