"""Archives of layers, entry by entry, and a directory to unpack them in, outside which nothing may change."""

from __future__ import annotations

import contextlib
import io
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from image import layer
from image.budget import Limits
from image.tree_ops import Usage

MTIME = 1_600_000_000


def entry(name: str, kind: bytes = tarfile.REGTYPE, /, **fields: int | str) -> tarfile.TarInfo:
    """Make a header; `fields` are attributes of TarInfo."""
    info = tarfile.TarInfo(name)
    info.type, info.mtime, info.mode = kind, MTIME, 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info


Item = tuple[tarfile.TarInfo, bytes]


def file(name: str, content: bytes = b"content", **fields: int) -> Item:
    """Make a file."""
    return entry(name, size=len(content), **fields), content


def folder(name: str, **fields: int) -> Item:
    """Make a directory."""
    return entry(name, tarfile.DIRTYPE, **fields), b""


def link(name: str, target: str) -> Item:
    """Make a symbolic link."""
    return entry(name, tarfile.SYMTYPE, linkname=target), b""


def hard(name: str, target: str) -> Item:
    """Make a hard link."""
    return entry(name, tarfile.LNKTYPE, linkname=target), b""


def archive(*items: Item, format: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of these entries."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, content in items:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    """Return everything that can be seen of a tree, times included."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (root, *sorted(root.rglob("*"))):
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found[str(path)] = (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, info.st_nlink, content)
    return found


def listing(folder: Path) -> list[str]:
    """Return the names in a directory."""
    return sorted(path.name for path in folder.iterdir())


@dataclass
class Jail:
    """A directory to unpack in, with files around it that must not change."""

    base: Path
    root: Path
    outside: Path

    def unpack(self, *items: Item, lowers: Sequence[str] = (), limits: Limits | None = None) -> Usage:
        """Unpack an archive of these entries."""
        return self.unpack_bytes(archive(*items), lowers=lowers, limits=limits)

    def unpack_bytes(
        self,
        data: bytes,
        chunk: int = 1 << 20,
        *,
        lowers: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> Usage:
        """Unpack an archive that comes in chunks of this size."""
        chunks = (data[at : at + chunk] for at in range(0, len(data), chunk))
        return layer.unpack(chunks, str(self.root), lowers=lowers, limits=limits)

    def layer(self, name: str, *items: Item, lowers: Sequence[str] = ()) -> str:
        """Make a lower layer of these entries; returns its directory."""
        path = self.base / name
        path.mkdir()
        layer.unpack(iter([archive(*items)]), str(path), lowers=lowers)
        return str(path)


@contextlib.contextmanager
def make_jail(tmp_path: Path) -> Iterator[Jail]:
    """Yield a jail; afterwards nothing outside of its root may have changed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("untouched")
    (outside / "victim").chmod(0o640)
    (outside / "folder").mkdir()
    root = tmp_path / "jail" / "root"
    root.mkdir(parents=True)
    before = picture(outside)
    entries = {path.name for path in Path("/").iterdir()}
    yield Jail(tmp_path, root, outside)
    assert picture(outside) == before
    assert [path.name for path in root.parent.iterdir()] == ["root"]
    assert {path.name for path in Path("/").iterdir()} == entries


def pax_records(**records: str) -> bytes:
    """Return the body of a pax header."""
    out = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body)
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        out += str(length).encode() + body
    return out


def raw_header(info: tarfile.TarInfo) -> bytes:
    """Return a ustar header block."""
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(data: bytes) -> bytes:
    """Return data with zeros up to a whole block."""
    return data + bytes(-len(data) % 512)


def with_pax(info: tarfile.TarInfo, data: bytes, **records: str) -> bytes:
    """Return an entry after a pax header with these records; "__" in a key stands for "."."""
    body = pax_records(**{key.replace("__", "."): value for key, value in records.items()})
    extension = entry("pax", tarfile.XHDTYPE, size=len(body))
    return raw_header(extension) + padded(body) + raw_header(info) + padded(data)


def raw_header_gnu(info: tarfile.TarInfo) -> bytes:
    """Return a GNU header block, whose numbers may be larger."""
    return info.tobuf(tarfile.GNU_FORMAT)
