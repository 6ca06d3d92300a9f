"""Archives with any content: the unpacker ends, raises only its own errors, and stays in its directory."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from image import layer
from image.blobs import BlobWriter
from image.budget import Limits
from image.compression import Inflated
from image.errors import ImageError
from image.manifest import Descriptor
from image.tree import NeedsBelow

LIMITS = Limits(layer_bytes=1 << 20, layer_entries=200)
# few names, so that entries meet each other
NAMES = st.lists(
    st.sampled_from(
        ["a", "b", "c", "..", ".", "", ".wh.a", ".wh.b", ".wh..wh..opq", ".wh..", "outside", "etc"]
    ),
    min_size=1,
    max_size=4,
).map("/".join)
TARGETS = st.one_of(NAMES, NAMES.map("/{}".format), st.just("{outside}"), st.just("../../outside/victim"))
KINDS = st.sampled_from([b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"x", b"g", b"L", b"K", b"Z"])


@st.composite
def items(draw: st.DrawFn) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(draw(NAMES))
    info.type = draw(KINDS)
    info.linkname = draw(TARGETS)
    content = draw(st.binary(max_size=600)) if info.type in b"07xgLK" else b""
    info.size = len(content)
    info.mode = draw(st.integers(0, 0o7777))
    info.uid = draw(st.integers(0, 70_000))
    info.devmajor, info.devminor = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return info, content


class Ground:
    """A layer's directory, with files around it that must not change."""

    def __init__(self, base: Path) -> None:
        self.root = base / "jail" / "root"
        self.root.mkdir(parents=True)
        self.outside = base / "outside"
        self.outside.mkdir()
        (self.outside / "victim").write_bytes(b"untouched")
        (self.outside / "victim").chmod(0o600)
        self.lower = base / "lower"
        (self.lower / "a" / "b").mkdir(parents=True)
        (self.lower / "b").symlink_to(self.outside)
        (self.lower / "c").write_bytes(b"below")
        self._before = self._picture()

    def _picture(self) -> list[tuple[object, ...]]:
        """Return the state of everything outside of the root."""
        seen: list[tuple[object, ...]] = [
            tuple(self.root.parent.iterdir()),
            tuple(self.root.parents[1].iterdir()),
        ]
        for path in sorted((*self.outside.rglob("*"), *self.lower.rglob("*"))):
            info = path.lstat()
            seen.append((path, info.st_mode, info.st_uid, info.st_size, info.st_nlink, info.st_mtime_ns))
        return seen

    def unchanged(self) -> bool:
        return self._picture() == self._before and (self.outside / "victim").read_bytes() == b"untouched"


@contextmanager
def ground() -> Iterator[Ground]:
    base = Path(tempfile.mkdtemp(prefix="husk-image-fuzz-"))
    try:
        yield Ground(base)
    finally:
        shutil.rmtree(base)


def try_unpack(place: Ground, data: bytes, chunk: int) -> None:
    pieces = (data[at : at + chunk] for at in range(0, len(data), chunk))
    try:
        layer.unpack(pieces, str(place.root), lowers=[str(place.lower)], limits=LIMITS)
    except ImageError:
        return


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(items(), max_size=12), st.integers(1, 5000))
def test_hostile_entries_stay_inside(entries: list[tuple[tarfile.TarInfo, bytes]], chunk: int) -> None:
    with ground() as place:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for info, content in entries:
                info.linkname = info.linkname.replace("{outside}", str(place.outside))
                tar.addfile(info, io.BytesIO(content))
        try_unpack(place, out.getvalue(), chunk)
        assert place.unchanged()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(items(), max_size=8))
def test_layer_without_those_below_is_as_with_them_or_refused(
    entries: list[tuple[tarfile.TarInfo, bytes]],
) -> None:
    with ground() as one, ground() as other:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for info, content in entries:
                info.linkname = info.linkname.replace("{outside}", "/outside")
                tar.addfile(info, io.BytesIO(content))
        ends = []
        for place, lowers in ((one, None), (other, [str(other.lower)])):
            try:
                layer.unpack(iter([out.getvalue()]), str(place.root), lowers=lowers, limits=LIMITS)
                ends.append(seen_in(place.root))
            except NeedsBelow:
                return
            except ImageError as error:
                ends.append([str(error).replace(str(place.root), "")])
        assert ends[0] == ends[1]


def seen_in(root: Path) -> list[object]:
    """Return names, kinds, modes, owners, links and contents of a tree."""
    found: list[object] = []
    for path in (root, *sorted(root.rglob("*"))):
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        names = sorted(os.listxattr(path, follow_symlinks=False))
        shown = (info.st_mode, info.st_uid, info.st_rdev, info.st_nlink, content, names)
        found.append((str(path.relative_to(root)), *shown))
    return found


def sample() -> bytes:
    """Return an archive with one entry of each kind, to be damaged."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in (("a", b"5"), ("a/f", b"0"), ("a/l", b"2"), ("a/h", b"1"), ("n" * 150, b"0")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a/f"
            info.size = 700 if kind == b"0" else 0
            info.pax_headers = {"mtime": "1.5", "SCHILY.xattr.user.x": "y"}
            tar.addfile(info, io.BytesIO(bytes(700)))
    return out.getvalue()


SAMPLE = sample()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.binary(min_size=1, max_size=16)), max_size=6),
       st.integers(0, len(SAMPLE)), st.booleans())  # fmt: skip
@example([(546, b"\x80")], 0, False)  # in the name of an attribute of a directory
@example([(546, b"\0")], 0, False)
def test_damaged_archive_stays_inside(damage: list[tuple[int, bytes]], cut: int, repair: bool) -> None:
    data = bytearray(SAMPLE)
    for at, new in damage:
        data[at : at + len(new)] = new
    if repair:
        mend_checksums(data)
    with ground() as place:
        try_unpack(place, bytes(data[: cut or None]), 1 << 16)
        assert place.unchanged()


def mend_checksums(data: bytearray) -> None:
    """Correct the checksums of damaged headers, so that the damage is read."""
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000), st.sampled_from([b"", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd"]))
def test_arbitrary_bytes_in_any_compression_are_rejected(data: bytes, magic: bytes) -> None:
    inflated = Inflated(io.BytesIO(magic + data))
    try:
        with ground() as place:
            try:
                layer.unpack(iter(inflated), str(place.root), limits=LIMITS)
            except ImageError:
                assert place.unchanged()
    finally:
        inflated.close()


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513])
async def test_blob_writer_accepts_exactly_the_announced_bytes(tmp_path: Path, length: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(length):
            yield b"x"

    digest = "sha256:" + "0" * 64
    writer = BlobWriter(tmp_path / "blob", Descriptor(digest=digest, size=512))
    try:
        with pytest.raises(ImageError):
            await writer.append(chunks())
            await writer.finish()
        assert writer.written <= 512
    finally:
        writer.close()
