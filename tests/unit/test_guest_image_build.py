"""Kernels are extracted from packages, archives are reproducible, builds replace the image atomically."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import lzma
import os
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from sandbox.apparmor.profile import PROFILE
from sandbox.guest_image import build as image_build
from sandbox.guest_image import cpio, packages
from sandbox.guest_image import vmlinux as vmlinux_module
from sandbox.guest_image.vmlinux import BadKernel, Kernel
from sandbox.vm_pods.boot_image import GuestImage, default_profile, find_image
from tests.kit.eventually import eventually

ELF = b"\x7fELF" + bytes(range(256)) * 500


def lz4_stored(data: bytes) -> bytes:
    """Make a legacy frame with one block of literals, as a compressor does for incompressible data."""
    length = len(data) - 15
    block = b"\xf0" + b"\xff" * (length // 255) + bytes([length % 255]) + data
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data),
    "xz": lambda data: lzma.compress(data),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
    "lz4": lz4_stored,
    "plain": lambda data: data,
}


def bzimage(payload: bytes, *, version: int = 0x20F) -> bytes:
    payload += struct.pack("<I", len(ELF))  # as the kernel's build appends it
    header = bytearray(1024)
    header[0x1F1] = 1
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, version)
    struct.pack_into("<II", header, 0x248, 64, len(payload))
    return bytes(header) + bytes(64) + payload


@pytest.mark.parametrize("name", FORMATS)
def test_kernel_is_extracted_from_each_format(name: str) -> None:
    got = vmlinux_module.extract_vmlinux(bzimage(FORMATS[name](ELF)))
    assert got[: len(ELF)] == ELF


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"MZ" + bytes(5000),
        bzimage(b"rubbish"),
        bzimage(b"\x1f\x8brubbish"),
        bzimage(lz4_stored(ELF)[:200]),
        bzimage(zlib.compress(b"no ELF")),
        bzimage(gzip.compress(b"no ELF")),
        bzimage(gzip.compress(ELF), version=0x200),
    ],
)
def test_image_that_is_not_a_kernel_is_rejected(image: bytes) -> None:
    with pytest.raises(BadKernel):
        vmlinux_module.extract_vmlinux(image, "it")


def make_tree(root: Path, *, fail: str = "") -> Kernel:
    """Make a kernel tree with modules in the three formats that distributions use."""
    modules = root / "lib/modules/6.1-test"
    forms = [
        ("virtio-ring", "", ".ko"),
        ("virtio_pci", "virtio-ring,virtio", ".ko.xz"),
        ("virtio", "virtio-ring", ".ko.zst"),
        ("fuse", "", ".ko.gz"),
        ("virtiofs", "fuse,virtio", ".ko"),
    ]
    names = {name.replace("-", "_") for name, _, _ in forms}
    forms += [(n, "virtio", ".ko") for n in image_build.MODULES if n not in names and n != fail]
    forms += [("stp", "", ".ko"), ("bridge", "stp,virtio", ".ko")]
    packers = {".ko": "plain", ".ko.xz": "xz", ".ko.zst": "zstd", ".ko.gz": "gzip"}
    (modules / "kernel/drivers").mkdir(parents=True)
    for name, depends, suffix in forms:
        content = b"\x7fELF" + f"\0license=GPL\0depends={depends}\0name={name}\0".encode()
        (modules / "kernel/drivers" / (name + suffix)).write_bytes(FORMATS[packers[suffix]](content))
    (modules / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    image = root / "boot/vmlinuz-6.1-test"
    image.parent.mkdir()
    image.write_bytes(bzimage(gzip.compress(ELF, mtime=0)))
    return Kernel(image=image, modules=modules)


def test_modules_follow_their_dependencies(tmp_path: Path) -> None:
    kernel = make_tree(tmp_path)
    found = vmlinux_module.find_modules(kernel.modules)
    loaded = list(vmlinux_module.load_modules(found, ["ext4"], ["virtio_pci", "ext4", "virtiofs"]))
    assert loaded == ["virtio_ring", "virtio", "virtio_pci", "fuse", "virtiofs"]
    with pytest.raises(BadKernel, match="nonsense"):
        vmlinux_module.load_modules(found, [], ["nonsense"])


SIGNED = b"~Module signature appended~\n"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (ELF + b"s" * 300 + bytes(8) + struct.pack(">I", 300) + SIGNED, ELF),
        (ELF + bytes(8) + struct.pack(">I", 0) + SIGNED, ELF),
        (ELF, ELF),
        (ELF + SIGNED[:-1], ELF + SIGNED[:-1]),
        (b"short" + SIGNED, b"short" + SIGNED),
        (ELF + b"\xff" * 12 + SIGNED, ELF + b"\xff" * 12 + SIGNED),
    ],
)
def test_only_a_signature_is_removed(module: bytes, expected: bytes) -> None:
    assert vmlinux_module.cut_signature(module) == expected


@pytest.mark.parametrize("keep", [True, False])
def test_signatures_stay_where_the_kernel_may_require_them(tmp_path: Path, keep: bool) -> None:
    module = tmp_path / "a.ko"
    module.write_bytes(ELF + bytes(12) + SIGNED)
    loaded = vmlinux_module.load_modules({"a": module}, [], ["a"], keep_signatures=keep)
    assert loaded == {"a": module.read_bytes() if keep else ELF}


def test_archive_is_read_by_cpio(tmp_path: Path) -> None:
    members = [
        cpio.directory("dev"),
        cpio.character_device("dev/console", 5, 1),
        cpio.file("init", b"#!agent", 0o755),
        cpio.file("odd", b"abc"),
    ]
    archive = cpio.write_archive(members)
    assert archive == cpio.write_archive(members)
    listed = subprocess.run(["cpio", "-itv", "--quiet"], input=archive, capture_output=True, check=True)
    lines = [line.split() for line in listed.stdout.decode().splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [
        ("drwxr-xr-x", "dev"),
        ("crw-------", "dev/console"),
        ("-rwxr-xr-x", "init"),
        ("-rw-r--r--", "odd"),
    ]
    assert all(line[2:4] == ["root", "root"] for line in lines)


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_bytes(b"\x7fELF agent")
    return path


@pytest.fixture
def parser(tmp_path: Path) -> Path:
    """A parser that copies its last argument, the profile, as the policy."""
    path = tmp_path / "parser"
    path.write_text("#!/bin/sh\nwhile [ $# -gt 1 ]; do [ $1 = --ofile ] && out=$2; shift; done\ncp $1 $out\n")
    path.chmod(0o755)
    return path


async def test_two_builds_give_the_same_bytes(tmp_path: Path, agent: Path, parser: Path) -> None:
    kernel = make_tree(tmp_path)
    images = []
    for name in ("one", "two"):
        root = tmp_path / name
        assert find_image(root) is None
        image = await image_build.build(root, kernel=kernel.image, agent=agent, parser=parser)
        assert image == find_image(root)
        assert image.kernel.read_bytes() == ELF
        assert image.kernel_version == "6.1-test"
        assert default_profile(root).read_text() == PROFILE
        images.append((image.hash, image.initramfs.read_bytes()))
    assert images[0] == images[1]


async def test_repeated_build_changes_nothing_unless_the_agent_differs(
    tmp_path: Path, agent: Path, parser: Path
) -> None:
    kernel = make_tree(tmp_path)
    root = tmp_path / "root"
    lines: list[str] = []

    async def build() -> GuestImage:
        return await image_build.build(
            root, kernel=kernel.image, agent=agent, parser=parser, progress=lines.append
        )

    first = await build()
    assert await build() == first
    hashes = [first.hash]
    for number in range(3):
        agent.write_bytes(b"agent %d" % number)
        hashes.append((await build()).hash)
        os.utime(root / "guest" / hashes[-1], (number, number))
    assert len(set(hashes)) == 4
    kept = {d.name for d in (root / "guest").iterdir()}
    assert {"current", hashes[-1]} < kept and len(kept) == 3, "the newest, the one before, and the link"
    assert lines


@contextlib.contextmanager
def mounted_elsewhere(source: Path, point: Path) -> Iterator[None]:
    """Mount a directory in the mount namespace of another process, as that of virtiofsd is."""
    mount = f"mount --bind {source} {point} && echo mounted && read line"
    command = ["unshare", "--mount", "sh", "-c", mount]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"mounted\n"
        yield
        process.stdin.close()


async def test_image_whose_modules_a_vm_may_load_is_kept(tmp_path: Path, agent: Path, parser: Path) -> None:
    kernel = make_tree(tmp_path)
    root, point = tmp_path / "root", tmp_path / "share"
    point.mkdir()

    async def build(number: int) -> Path:
        agent.write_bytes(b"agent %d" % number)
        image = await image_build.build(root, kernel=kernel.image, agent=agent, parser=parser)
        directory = image.kernel.parent
        os.utime(directory, (number, number))
        return directory

    oldest = await build(1)
    with mounted_elsewhere(oldest / "modules", point):
        older = await build(2)
        await build(3)
        await build(4)
        assert oldest.exists() and not older.exists()
    await build(5)
    assert not oldest.exists()


async def test_failed_build_leaves_the_old_image(tmp_path: Path, agent: Path, parser: Path) -> None:
    root = tmp_path / "root"
    image = await image_build.build(
        root, kernel=make_tree(tmp_path / "good").image, agent=agent, parser=parser
    )
    (root / "guest/.build-killed").mkdir()
    bad = make_tree(tmp_path / "bad", fail="virtio_net")
    with pytest.raises(BadKernel, match="virtio_net"):
        await image_build.build(root, kernel=bad.image, agent=agent, parser=parser)
    assert find_image(root) == image
    await image_build.build(root, kernel=make_tree(tmp_path / "again").image, agent=agent, parser=parser)
    assert not list((root / "guest").glob(".build-*"))


async def test_kernel_without_modules_is_rejected(tmp_path: Path, agent: Path, parser: Path) -> None:
    lonely = tmp_path / "vmlinuz-0.0-nowhere"
    lonely.write_bytes(ELF)
    with pytest.raises(BadKernel, match="--modules"):
        await image_build.build(tmp_path, kernel=lonely, agent=agent, parser=parser)


async def test_concurrent_builds_wait_for_each_other(tmp_path: Path) -> None:
    """One would remove the scratch directory of the other."""
    lines: list[str] = []
    async with packages.alone(tmp_path, lines.append):
        second = asyncio.create_task(_enter(tmp_path, lines.append))
        await eventually(lambda: lines)
        assert lines == ["waiting for another build to end"] and not second.done()
    async with asyncio.timeout(5):
        await second


async def _enter(directory: Path, progress: packages.Progress) -> None:
    async with packages.alone(directory, progress):
        pass
