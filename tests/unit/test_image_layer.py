"""Unpacking: what a good layer becomes, and what a hostile one does not reach."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import struct
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from image import layer, tree
from image.errors import DiskFull, ImageError, LayerRejected
from image.layer import Limits
from image.tree_ops import Usage
from tests.fakes.disk import small_disk

MTIME = 1_600_000_000


def entry(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mtime, info.mode = kind, MTIME, 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info


Item = tuple[tarfile.TarInfo, bytes]


def file(name: str, content: bytes = b"content", **fields: Any) -> Item:
    return entry(name, size=len(content), **fields), content


def folder(name: str, **fields: Any) -> Item:
    return entry(name, tarfile.DIRTYPE, **fields), b""


def link(name: str, target: str) -> Item:
    return entry(name, tarfile.SYMTYPE, linkname=target), b""


def hard(name: str, target: str) -> Item:
    return entry(name, tarfile.LNKTYPE, linkname=target), b""


def archive(*items: Item, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, content in items:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    """All that can be seen of a tree, times included."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (root, *sorted(root.rglob("*"))):
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found[str(path)] = (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, info.st_nlink, content)
    return found


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@dataclass
class Jail:
    """A place to unpack in, with things around it that must not change."""

    base: Path
    root: Path
    outside: Path

    def unpack(self, *items: Item, **options: Any) -> Usage:
        return self.unpack_bytes(archive(*items), **options)

    def unpack_bytes(self, data: bytes, chunk: int = 1 << 20, **options: Any) -> Usage:
        chunks = (data[at : at + chunk] for at in range(0, len(data), chunk))
        return layer.unpack(chunks, str(self.root), **options)

    def layer(self, name: str, *items: Item, lowers: Sequence[str] = ()) -> str:
        path = self.base / name
        path.mkdir()
        layer.unpack(iter([archive(*items)]), str(path), lowers=lowers)
        return str(path)


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Jail]:
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


# ------------------------------------------------------------------------------ good layers


def test_owner_mode_time_and_content(jail: Jail) -> None:
    usage = jail.unpack(
        folder("usr", mode=0o2775, uid=7, gid=8),
        file("usr/tool", b"x" * 5000, mode=0o4751, uid=1000, gid=1001),
        link("usr/alias", "tool"),
        hard("usr/twin", "usr/tool"),
        (entry("usr/pipe", tarfile.FIFOTYPE, mode=0o600), b""),
        (entry("usr/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666), b""),
        (entry("usr/disk", tarfile.BLKTYPE, devmajor=8, devminor=1, mode=0o660, gid=6), b""),
    )
    tool = (jail.root / "usr/tool").lstat()
    assert (stat.S_IMODE(tool.st_mode), tool.st_uid, tool.st_gid, tool.st_mtime) == (
        0o4751,
        1000,
        1001,
        MTIME,
    )
    assert tool.st_nlink == 2
    assert (jail.root / "usr/tool").read_bytes() == b"x" * 5000
    usr = (jail.root / "usr").lstat()
    assert (stat.S_IMODE(usr.st_mode), usr.st_uid, usr.st_gid, usr.st_mtime) == (0o2775, 7, 8, MTIME)
    assert str((jail.root / "usr/alias").readlink()) == "tool"
    assert (jail.root / "usr/alias").lstat().st_mtime == MTIME
    assert stat.S_ISFIFO((jail.root / "usr/pipe").lstat().st_mode)
    null = (jail.root / "usr/null").lstat()
    assert stat.S_ISCHR(null.st_mode) and null.st_rdev == os.makedev(1, 3)
    assert stat.S_IMODE(null.st_mode) == 0o666
    disk = (jail.root / "usr/disk").lstat()
    assert stat.S_ISBLK(disk.st_mode) and disk.st_rdev == os.makedev(8, 1) and disk.st_gid == 6
    # root, usr, tool, alias, pipe, null, disk
    assert usage.inodes == 7 and usage.bytes >= 5000


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_and_chunk_size(jail: Jail, format: int) -> None:
    data = archive(folder("a/b"), file("a/b/c", bytes(range(256)) * 9), link("a/l", "b/c"), format=format)
    jail.unpack_bytes(data, chunk=97)
    assert (jail.root / "a/b/c").read_bytes() == bytes(range(256)) * 9


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(jail: Jail, format: int) -> None:
    name = "/".join(["d" * 60] * 5 + ["f" * 200])
    target = "t" * 300
    jail.unpack_bytes(archive(file(name), link("long", target), format=format))
    assert (jail.root / name).read_bytes() == b"content"
    assert str((jail.root / "long").readlink()) == target


def test_names_that_are_not_utf8(jail: Jail) -> None:
    jail.unpack(file(os.fsdecode(b"caf\xe9")))
    assert [os.fsencode(name) for name in listing(jail.root)] == [b"caf\xe9"]


def test_pax_fractions_large_ids_and_early_times(jail: Jail) -> None:
    info, content = file("f", uid=3_000_000_000)
    info.mtime = -1.5
    jail.unpack((info, content))
    found = (jail.root / "f").lstat()
    assert found.st_uid == 3_000_000_000
    assert found.st_mtime_ns == -1_500_000_000


def test_file_capabilities_are_kept_and_host_labels_dropped(jail: Jail) -> None:
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    info, content = file("ping", uid=5)
    info.pax_headers = {
        "SCHILY.xattr.security.capability": capability.decode("latin-1"),
        "SCHILY.xattr.security.selinux": "system_u:object_r:bin_t:s0",
        "SCHILY.xattr.user.overlay.opaque": "y",
    }
    jail.unpack_bytes(archive((info, content)))
    assert os.getxattr(jail.root / "ping", "security.capability") == capability
    assert os.listxattr(jail.root / "ping") == ["security.capability"]


def test_directory_attributes_survive_later_content(jail: Jail) -> None:
    jail.unpack(folder("locked", mode=0o500, uid=9), file("locked/inside"), file("locked/more"))
    found = (jail.root / "locked").lstat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_mtime) == (0o500, 9, MTIME)


def test_attributes_of_the_root_itself(jail: Jail) -> None:
    jail.unpack(folder("./", mode=0o711, uid=3), file("./f"))
    found = jail.root.lstat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o711, 3)


def test_missing_parents_are_made(jail: Jail) -> None:
    jail.unpack(file("a/b/c"))
    assert stat.S_IMODE((jail.root / "a/b").lstat().st_mode) == 0o755


def test_more_directories_than_are_kept_open(jail: Jail) -> None:
    names = [f"d{n}/e{n}" for n in range(200)]
    jail.unpack(*(file(f"{name}/one") for name in names), *(file(f"{name}/two") for name in names))
    assert all((jail.root / name / "two").exists() for name in names)
    assert len(listing(Path("/proc/self/fd"))) < 100


def test_no_descriptor_is_left_open(jail: Jail) -> None:
    before = len(listing(Path("/proc/self/fd")))
    jail.unpack(*(file(f"d{n}/f") for n in range(50)))
    with pytest.raises(LayerRejected):
        jail.unpack(*(file(f"e{n}/f") for n in range(5)), file("../x"))
    assert len(listing(Path("/proc/self/fd"))) == before


def test_an_empty_archive_and_one_without_an_end(jail: Jail) -> None:
    assert jail.unpack_bytes(b"").inodes == 1
    assert jail.unpack_bytes(archive(file("f"))[:1024]).inodes == 2


# ----------------------------------------------------------------------------- sparse files


def pax_records(**records: str) -> bytes:
    out = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body)
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        out += str(length).encode() + body
    return out


def raw_header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def with_pax(info: tarfile.TarInfo, data: bytes, **records: str) -> bytes:
    body = pax_records(**{key.replace("__", "."): value for key, value in records.items()})
    extension = entry("pax", tarfile.XHDTYPE, size=len(body))
    return raw_header(extension) + padded(body) + raw_header(info) + padded(data)


SPARSE = bytes(4096) + b"data" + bytes(4092) + b"tail"


def test_sparse_by_pax_map(jail: Jail) -> None:
    info = entry("made/up/name", size=8)
    jail.unpack_bytes(
        with_pax(info, b"datatail", GNU__sparse__map="4096,4,8192,4", GNU__sparse__size="8196",
                 GNU__sparse__name="holes")
    )  # fmt: skip
    assert (jail.root / "holes").read_bytes() == SPARSE
    assert not (jail.root / "made").exists()


def test_sparse_with_its_map_before_the_data(jail: Jail) -> None:
    stored = padded(b"2\n4096\n4\n8192\n4\n") + b"datatail"
    info = entry("x", size=len(stored))
    jail.unpack_bytes(
        with_pax(info, stored, GNU__sparse__major="1", GNU__sparse__minor="0",
                 GNU__sparse__name="holes", GNU__sparse__realsize="8196")
    )  # fmt: skip
    assert (jail.root / "holes").read_bytes() == SPARSE


def test_sparse_of_old_gnu_tar(jail: Jail) -> None:
    header = bytearray(raw_header(entry("holes", b"S", size=8)))
    header[257:265] = b"ustar  \0"
    header[386:410] = b"%011o\0%011o\0" % (4096, 4)
    header[410:434] = b"%011o\0%011o\0" % (8192, 4)
    header[482] = 0
    header[483:495] = b"%011o\0" % 8196
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    jail.unpack_bytes(bytes(header) + padded(b"datatail"))
    assert (jail.root / "holes").read_bytes() == SPARSE


@pytest.mark.parametrize("sparse_map", ["0,4,2,4", "4,4,0,4", "0,8,8,100", "0,4"])
def test_impossible_sparse_maps(jail: Jail, sparse_map: str) -> None:
    data = with_pax(entry("x", size=8), b"datatail", GNU__sparse__map=sparse_map, GNU__sparse__size="16")
    with pytest.raises(LayerRejected, match="sparse"):
        jail.unpack_bytes(data)


# ------------------------------------------------------------------------------ escape paths


def test_absolute_paths_begin_at_the_layers_root(jail: Jail) -> None:
    target = jail.outside / "victim"
    jail.unpack(file(str(target), b"changed"))
    assert (jail.root / str(target)[1:]).read_bytes() == b"changed"


@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped", "../../../../../../tmp/escaped", ".."])
def test_climbing_out_is_refused(jail: Jail, name: str) -> None:
    with pytest.raises(LayerRejected, match="climbs out"):
        jail.unpack(file(name))


def test_dots_that_stay_inside_are_cleaned(jail: Jail) -> None:
    jail.unpack(folder("a"), file("a/./b/../c"))
    assert (jail.root / "a/c").exists()


@pytest.mark.parametrize(
    "target", ["{outside}", "../../outside", "/../../{outside}", "../" * 20 + "{outside}"]
)
def test_a_symlink_is_no_way_out(jail: Jail, target: str) -> None:
    """What lies behind the link is made inside, as the finished root would see it."""
    jail.unpack(link("door", target.format(outside=jail.outside)), file("door/victim", b"changed"))
    assert (jail.outside / "victim").read_text() == "untouched"
    inside = [p for p in jail.root.rglob("victim") if p.read_bytes() == b"changed"]
    assert len(inside) == 1


def test_a_chain_of_symlinks_is_no_way_out(jail: Jail) -> None:
    jail.unpack(
        link("a", "b"), link("b", "/c"), link("c", "../.."), file("a/etc/passwd", b"x"),
    )  # fmt: skip
    assert (jail.root / "etc/passwd").read_bytes() == b"x"


def test_symlink_loops_end(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="too many symbolic links"):
        jail.unpack(link("a", "b"), link("b", "a"), file("a/f"))


def test_a_file_is_not_written_through_a_symlink(jail: Jail) -> None:
    jail.unpack(link("f", str(jail.outside / "victim")), file("f", b"new"))
    assert not (jail.root / "f").is_symlink()
    assert (jail.root / "f").read_bytes() == b"new"


def test_modes_and_times_are_not_set_through_a_symlink(jail: Jail) -> None:
    jail.unpack((entry("f", tarfile.SYMTYPE, linkname=str(jail.outside / "victim"), mode=0o777, uid=5), b""))
    assert (jail.root / "f").lstat().st_uid == 5


def test_a_directory_replaced_by_a_symlink_is_not_followed_at_the_end(jail: Jail) -> None:
    """Directory attributes are set last: the name may stand for a way out by then."""
    jail.unpack(folder("d", mode=0o777, uid=12), link("d", str(jail.outside / "folder")))
    assert (jail.root / "d").is_symlink()


def test_an_open_directory_is_forgotten_when_it_is_replaced(jail: Jail) -> None:
    jail.unpack(folder("d/e"), file("d/e/f"), link("d", str(jail.outside)), file("d/e/g", b"x"))
    assert not (jail.outside / "e").exists()


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../outside/victim", "{outside}/victim", "door/victim", "missing"]
)
def test_hard_links_to_outside(jail: Jail, target: str) -> None:
    with pytest.raises(LayerRejected):
        jail.unpack(link("door", str(jail.outside)), hard("stolen", target.format(outside=jail.outside)))
    assert not (jail.root / "stolen").exists()


def test_a_hard_link_to_a_symlink_links_the_link(jail: Jail) -> None:
    jail.unpack(link("l", str(jail.outside / "victim")), hard("twin", "l"), file("twin", b"new"))
    assert (jail.root / "l").is_symlink()
    assert (jail.root / "twin").read_bytes() == b"new"


@pytest.mark.parametrize("target", [".", "d", "f", "dev"])
def test_hard_links_to_what_cannot_be_linked(jail: Jail, target: str) -> None:
    with pytest.raises(LayerRejected):
        jail.unpack(folder("d"), folder("dev"), file("f"), hard("f" if target == "f" else "x", target))


def test_a_hard_link_onto_its_own_file_keeps_it(jail: Jail) -> None:
    jail.unpack(file("a", b"data"), hard("b", "a"), hard("b", "a"), hard("a", "b"))
    assert (jail.root / "a").read_bytes() == (jail.root / "b").read_bytes() == b"data"


def test_a_file_in_the_way_of_a_directory(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="not a directory"):
        jail.unpack(file("a"), file("a/b"))


# ------------------------------------------------------------------------ duplicates, kinds


def test_the_last_of_a_name_wins_whatever_its_kind(jail: Jail) -> None:
    jail.unpack(
        file("x", b"1"), file("x", b"2"), folder("x"), file("x/inner"), file("x", b"3"),
        folder("y"), file("y/inner"), folder("y", mode=0o700), link("z", "a"), folder("z"),
    )  # fmt: skip
    assert (jail.root / "x").read_bytes() == b"3"
    assert (jail.root / "y/inner").exists()
    assert stat.S_IMODE((jail.root / "y").lstat().st_mode) == 0o700
    assert (jail.root / "z").is_dir() and not (jail.root / "z").is_symlink()


def test_unknown_kinds_are_refused(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="unknown kind"):
        jail.unpack((entry("x", b"Z"), b""))


def test_a_smuggled_whiteout_is_refused(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="whiteout"):
        jail.unpack((entry("x", tarfile.CHRTYPE), b""))


@pytest.mark.parametrize("name", ["overlay.opaque", "overlay.redirect", "overlay.metacopy", "anything"])
def test_trusted_attributes_are_refused(jail: Jail, name: str) -> None:
    info, content = file("f")
    info.pax_headers = {f"SCHILY.xattr.trusted.{name}": "y"}
    with pytest.raises(LayerRejected, match=f"trusted.{name}"):
        jail.unpack((info, content))


# -------------------------------------------------------------------------------- whiteouts


def test_whiteouts_and_opaque_directories(jail: Jail) -> None:
    lower = jail.layer("lower", folder("a"), file("a/gone"), file("a/stays"), folder("b"), file("b/old"))
    jail.unpack(
        file("a/.wh.gone", b""), file("b/.wh..wh..opq", b""), file("b/new"), file(".wh..wh.plnk", b""),
        lowers=[lower],
    )  # fmt: skip
    assert tree.is_whiteout((jail.root / "a/gone").lstat())
    assert os.getxattr(jail.root / "b", tree.OPAQUE) == b"y"
    assert listing(jail.root) == ["a", "b"]
    assert listing(jail.root / "b") == ["new"]


def test_a_whiteout_hides_only_what_is_below(jail: Jail) -> None:
    lower = jail.layer("lower", file("d/old"), file("f", b"old"))
    jail.unpack(file("d/mine"), file(".wh.d", b""), file("f", b"mine"), file(".wh.f", b""), lowers=[lower])
    assert (jail.root / "d/mine").exists()
    assert os.getxattr(jail.root / "d", tree.OPAQUE) == b"y"
    assert (jail.root / "f").read_bytes() == b"mine"


def test_a_directory_made_after_its_whiteout_is_empty_below(jail: Jail) -> None:
    lower = jail.layer("lower", file("d/old"))
    jail.unpack(file(".wh.d", b""), folder("d"), file("d/new"), lowers=[lower])
    assert os.getxattr(jail.root / "d", tree.OPAQUE) == b"y"


@pytest.mark.parametrize("name", [".wh...", ".wh..", ".wh.", "a/.wh..."])
def test_whiteouts_aimed_outside_are_refused(jail: Jail, name: str) -> None:
    lower = jail.layer("lower", folder("a"))
    with pytest.raises(LayerRejected, match="whiteout"):
        jail.unpack(file(name, b""), lowers=[lower])


def test_a_whiteout_behind_a_symlink_stays_inside(jail: Jail) -> None:
    lower = jail.layer("lower", folder("a"))
    jail.unpack(link("door", str(jail.outside)), file("door/.wh.victim", b""), lowers=[lower])
    assert (jail.outside / "victim").exists()


# ---------------------------------------------------------------------- the layers below


def test_parents_that_only_a_lower_layer_has_look_as_there(jail: Jail) -> None:
    lower = jail.layer("lower", folder("tmp", mode=0o1777), folder("srv", uid=33, mode=0o750))
    jail.unpack(file("tmp/x"), file("srv/y"), lowers=[lower])
    assert stat.S_IMODE((jail.root / "tmp").lstat().st_mode) == 0o1777
    srv = (jail.root / "srv").lstat()
    assert (srv.st_uid, stat.S_IMODE(srv.st_mode), srv.st_mtime > MTIME) == (33, 0o750, True)


def test_a_symlink_below_is_followed(jail: Jail) -> None:
    """bin/tool above a root whose bin is a link to usr/bin."""
    lower = jail.layer("lower", folder("usr/bin", mode=0o751), link("bin", "usr/bin"))
    jail.unpack(file("bin/tool"), lowers=[lower])
    assert (jail.root / "usr/bin/tool").exists()
    assert stat.S_IMODE((jail.root / "usr/bin").lstat().st_mode) == 0o751
    assert not (jail.root / "bin").exists()


def test_a_symlink_below_is_no_way_out(jail: Jail) -> None:
    lower = jail.layer("lower", link("door", str(jail.outside)))
    jail.unpack(file("door/victim", b"changed"), lowers=[lower])
    assert (jail.root / str(jail.outside)[1:] / "victim").read_bytes() == b"changed"


def test_a_hidden_lower_directory_is_not_copied(jail: Jail) -> None:
    bottom = jail.layer("bottom", folder("d", mode=0o700))
    middle = jail.layer("middle", file(".wh.d", b""), lowers=[bottom])
    jail.unpack(file("d/f"), lowers=[middle, bottom])
    assert stat.S_IMODE((jail.root / "d").lstat().st_mode) == 0o755


def test_a_hard_link_to_a_file_below_copies_it_up(jail: Jail) -> None:
    bottom = jail.layer("bottom", folder("d", mode=0o711), file("d/f", b"below", uid=4, mode=0o4755))
    jail.unpack(hard("twin", "d/f"), lowers=[bottom])
    twin = (jail.root / "twin").lstat()
    assert (jail.root / "twin").read_bytes() == b"below"
    assert (twin.st_uid, stat.S_IMODE(twin.st_mode), twin.st_nlink, twin.st_mtime) == (4, 0o4755, 2, MTIME)
    assert stat.S_IMODE((jail.root / "d").lstat().st_mode) == 0o711


def test_a_hard_link_to_a_whited_out_file(jail: Jail) -> None:
    bottom = jail.layer("bottom", file("f"))
    with pytest.raises(LayerRejected):
        jail.unpack(file(".wh.f", b""), hard("twin", "f"), lowers=[bottom])


# ----------------------------------------------------------------------------------- limits


def test_too_many_entries(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="more than 10 entries"):
        jail.unpack(*(file(f"f{n}") for n in range(11)), limits=Limits(max_entries=10))


def test_too_many_bytes_are_refused_before_they_come(jail: Jail) -> None:
    info = entry("huge", size=1 << 40)
    with pytest.raises(LayerRejected, match="more than 1000 bytes"):
        jail.unpack_bytes(raw_header_gnu(info), limits=Limits(max_bytes=1000))
    assert not (jail.root / "huge").exists()


def raw_header_gnu(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_hole_as_large_as_a_disk_counts(jail: Jail) -> None:
    data = with_pax(entry("x", size=0), b"", GNU__sparse__map="0,0", GNU__sparse__size=str(1 << 50))
    with pytest.raises(LayerRejected, match="bytes when unpacked"):
        jail.unpack_bytes(data)


def test_too_deep(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="directories deep"):
        jail.unpack(file("d/" * 300 + "f"))


@pytest.mark.parametrize("below", [False, True])
def test_link_target_deeper_than_the_limit_is_rejected(jail: Jail, below: bool) -> None:
    """146 bytes of layer would make a tree 1,990 directories deep."""
    deep = link("door", "/".join(["d"] * 1990))
    lowers = [jail.layer("lower", deep)] if below else []
    with pytest.raises(LayerRejected, match="directories deep"):
        jail.unpack(*([] if below else [deep]), file("door/f"), lowers=lowers)


def test_too_long_a_component(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="File name too long"):
        jail.unpack(file("n" * 256))


def test_a_huge_extension_header(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="extension header"):
        jail.unpack_bytes(raw_header(entry("x", tarfile.XHDTYPE, size=1 << 30)))


@pytest.mark.parametrize(
    "record",
    [
        b"5 a=\n",
        b"99 path=x\n",
        b"x path=y\n",
        b"0 path=\n",
        b"11 pathyyyy\n",
        b"9999999999999999999999 a=b\n",
    ],
)
def test_broken_extension_headers(jail: Jail, record: bytes) -> None:
    header = raw_header(entry("x", tarfile.XHDTYPE, size=len(record)))
    data = header + padded(record) + raw_header(entry("f"))
    with contextlib.suppress(LayerRejected):
        jail.unpack_bytes(data)
    assert set(listing(jail.root)) <= {"f", "x"}


@pytest.mark.parametrize("cut", [100, 512, 600, 1000])
def test_cut_off(jail: Jail, cut: int) -> None:
    data = archive(file("f", b"x" * 2000))
    with pytest.raises(LayerRejected, match="ends in the middle"):
        jail.unpack_bytes(data[:cut])


def test_rubbish(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="not a tar header"):
        jail.unpack_bytes(hashlib.sha512(b"seed").digest() * 16)


def test_a_negative_size(jail: Jail) -> None:
    header = bytearray(raw_header(entry("f")))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(LayerRejected, match="impossible size"):
        jail.unpack_bytes(bytes(header))


def test_a_zero_byte_in_a_name(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="zero byte"):
        jail.unpack_bytes(with_pax(entry("x"), b"", path="a\0b"))


def test_it_stops_when_asked(jail: Jail) -> None:
    stop = threading.Event()

    def chunks() -> Iterator[bytes]:
        data = archive(*(file(f"f{n}") for n in range(100)))
        yield data[:10240]
        stop.set()
        yield data[10240:]

    with pytest.raises(layer.Stopped):
        layer.unpack(chunks(), str(jail.root), stop=stop)
    assert len(listing(jail.root)) < 100


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk, pytest.raises(DiskFull):
        (disk / "root").mkdir()
        layer.unpack(iter([archive(file("big", bytes(2 << 20)))]), str(disk / "root"))


def test_errors_are_the_packages_own(jail: Jail) -> None:
    with pytest.raises(ImageError):
        jail.unpack(file("../x"))
