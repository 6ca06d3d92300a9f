"""What a distribution's kernel package holds, in the form that a VM boots from.

A bzImage carries the real kernel, compressed, as its payload. Taken out beforehand it is entered
directly (PVH), and no guest spends its start on decompression. Modules are brought to plain `.ko`
for the same reason, in an order in which each finds what it needs already loaded.
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
    """The kernel image or its modules are not in a form that can be used."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(f"{what}: {problem}")
        self.what = what
        self.problem = problem


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel image (bzImage or ELF) and the /lib/modules/VERSION that belongs to it.

    `keep_signatures` where it is not known whether the kernel insists on modules that are signed.
    """

    image: Path
    modules: Path
    keep_signatures: bool = True

    @property
    def version(self) -> str:
        return self.modules.name


def extract_vmlinux(image: bytes, name: str = "kernel") -> bytes:
    """The ELF kernel inside a bzImage; an ELF file is returned as it is.

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
        raise BadKernel(name, f"boot protocol {version:#x} does not say where the kernel is")
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    vmlinux = decompress(image[start : start + length], name)
    if vmlinux[:4] != b"\x7fELF":
        raise BadKernel(name, "its payload is not an ELF file")
    return vmlinux


def decompress(data: bytes, name: str) -> bytes:
    """Undo whatever the kernel's build may have used, told by magic number.

    A kernel's payload has its unpacked size appended, which every format but its own ignores.
    Raises BadKernel, or MissingProgram where the lz4 library is not there.
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
    raise BadKernel(name, f"unknown compression, it begins with {data[:6].hex()}")


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
            raise BadKernel(name, "its lz4 data is cut short")
        got = library.LZ4_decompress_safe(data[at : at + size], block, size, _LZ4_BLOCK)
        if got < 0:
            raise BadKernel(name, "its lz4 data is damaged")
        unpacked += memoryview(block)[:got]
        at += size
    return bytes(unpacked)


# -------------------------------------------------------------------------------------- modules


def find_modules(directory: Path) -> dict[str, Path]:
    """Module files by name, dashes as underscores, below /lib/modules/VERSION."""
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
    """The wanted modules and what they need, unpacked, each after its dependencies.

    What is built into the kernel is left out. Dependencies are read from the modules themselves,
    as a package brings no modules.dep before depmod has run. Raises BadKernel for a missing one.
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
    """The `depends=` line of a module's .modinfo section: NUL-ended strings, names by commas."""
    at = module.find(b"\0depends=")
    if at < 0:
        return []
    text = module[at + 9 : module.index(b"\0", at + 9)].decode()
    return [name.replace("-", "_") for name in text.split(",") if name]


def find_aliases(module: bytes) -> list[str]:
    """Other names that a kernel asks for it by; the patterns that match hardware are left out."""
    names = (each.decode() for each in re.findall(rb"\0alias=([^\0]+)", module))
    return [name for name in names if not set(name) & set("*?[/")]


def load_orders(modules: Mapping[str, bytes]) -> dict[str, list[str]]:
    """By name and alias: what to load, dependencies first. What is not among `modules` is loaded
    already."""

    def order(name: str) -> list[str]:
        before = [
            each for need in find_dependencies(modules[name]) if need in modules for each in order(need)
        ]
        return [*dict.fromkeys(before), name]

    return {alias: order(name) for name in modules for alias in (name, *find_aliases(modules[name]))}


def cut_signature(module: bytes) -> bytes:
    """The module without its signature: the host vouches for the initramfs, and checking costs a start.

    Behind the signature are struct module_signature, whose last four bytes of twelve are the length
    (big-endian), and a line of text: kernel's include/linux/module_signature.h.
    """
    body = module.removesuffix(_SIGNED)
    if body == module or len(body) < 12:
        return module
    (length,) = struct.unpack(">I", body[-4:])
    return body[: len(body) - 12 - length] if length <= len(body) - 12 else module


def read_builtin(directory: Path) -> list[str]:
    """Names from modules.builtin (kernel's Documentation/kbuild/kbuild.rst)."""
    lines = (directory / "modules.builtin").read_text().split()
    return [Path(line).name.removesuffix(".ko").replace("-", "_") for line in lines]
