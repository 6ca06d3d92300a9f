"""Unpacking a layer: attributes, kinds of entries, whiteouts, and the layers below."""

from __future__ import annotations

import os
import stat
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from image import layer, tree
from image.errors import LayerRejected
from tests.kit.layers import (
    MTIME,
    Jail,
    archive,
    entry,
    file,
    folder,
    hard,
    link,
    listing,
    make_jail,
)  # fmt: skip


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Jail]:
    with make_jail(tmp_path) as jail:
        yield jail


# ------------------------------------------------------------------------------------------------ attributes


def test_entries_keep_owner_mode_time_and_content(jail: Jail) -> None:
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
def test_every_tar_format_is_unpacked_from_any_chunk_size(jail: Jail, format: int) -> None:
    data = archive(folder("a/b"), file("a/b/c", bytes(range(256)) * 9), link("a/l", "b/c"), format=format)
    jail.unpack_bytes(data, chunk=97)
    assert (jail.root / "a/b/c").read_bytes() == bytes(range(256)) * 9


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_unpacked(jail: Jail, format: int) -> None:
    name = "/".join(["d" * 60] * 5 + ["f" * 200])
    target = "t" * 300
    jail.unpack_bytes(archive(file(name), link("long", target), format=format))
    assert (jail.root / name).read_bytes() == b"content"
    assert str((jail.root / "long").readlink()) == target


def test_names_that_are_not_utf8_are_kept(jail: Jail) -> None:
    jail.unpack(file(os.fsdecode(b"caf\xe9")))
    assert [os.fsencode(name) for name in listing(jail.root)] == [b"caf\xe9"]


def test_pax_fractions_large_ids_and_times_before_1970_are_kept(jail: Jail) -> None:
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


def test_directory_attributes_survive_later_entries(jail: Jail) -> None:
    jail.unpack(folder("locked", mode=0o500, uid=9), file("locked/inside"), file("locked/more"))
    found = (jail.root / "locked").lstat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_mtime) == (0o500, 9, MTIME)


def test_root_entry_sets_attributes_of_the_root(jail: Jail) -> None:
    jail.unpack(folder("./", mode=0o711, uid=3), file("./f"))
    found = jail.root.lstat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o711, 3)


def test_missing_parents_are_made_with_mode_0755(jail: Jail) -> None:
    jail.unpack(file("a/b/c"))
    assert stat.S_IMODE((jail.root / "a/b").lstat().st_mode) == 0o755


def test_more_directories_than_are_kept_open_are_unpacked(jail: Jail) -> None:
    names = [f"d{n}/e{n}" for n in range(200)]
    jail.unpack(*(file(f"{name}/one") for name in names), *(file(f"{name}/two") for name in names))
    assert all((jail.root / name / "two").exists() for name in names)
    assert len(listing(Path("/proc/self/fd"))) < 100


def test_descriptors_are_closed_after_success_and_failure(jail: Jail) -> None:
    before = len(listing(Path("/proc/self/fd")))
    jail.unpack(*(file(f"d{n}/f") for n in range(50)))
    with pytest.raises(LayerRejected):
        jail.unpack(*(file(f"e{n}/f") for n in range(5)), file("../x"))
    assert len(listing(Path("/proc/self/fd"))) == before


def test_empty_archive_and_archive_without_end_blocks_are_unpacked(jail: Jail) -> None:
    assert jail.unpack_bytes(b"").inodes == 1
    assert jail.unpack_bytes(archive(file("f"))[:1024]).inodes == 2


# ----------------------------------------------------------------------------------------------------- kinds


def test_last_entry_of_a_name_wins_whatever_its_kind(jail: Jail) -> None:
    jail.unpack(
        file("x", b"1"), file("x", b"2"), folder("x"), file("x/inner"), file("x", b"3"),
        folder("y"), file("y/inner"), folder("y", mode=0o700), link("z", "a"), folder("z"),
    )  # fmt: skip
    assert (jail.root / "x").read_bytes() == b"3"
    assert (jail.root / "y/inner").exists()
    assert stat.S_IMODE((jail.root / "y").lstat().st_mode) == 0o700
    assert (jail.root / "z").is_dir() and not (jail.root / "z").is_symlink()


def test_entry_of_unknown_kind_is_rejected(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="unknown kind"):
        jail.unpack((entry("x", b"Z"), b""))


def test_device_0_0_is_rejected(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="whiteout"):
        jail.unpack((entry("x", tarfile.CHRTYPE), b""))


@pytest.mark.parametrize("name", ["overlay.opaque", "overlay.redirect", "overlay.metacopy", "anything"])
def test_trusted_xattr_is_rejected(jail: Jail, name: str) -> None:
    info, content = file("f")
    info.pax_headers = {f"SCHILY.xattr.trusted.{name}": "y"}
    with pytest.raises(LayerRejected, match=f"trusted.{name}"):
        jail.unpack((info, content))


# ------------------------------------------------------------------------------------------------- whiteouts


def test_whiteouts_and_opaque_markers_take_overlayfs_form(jail: Jail) -> None:
    lower = jail.layer("lower", folder("a"), file("a/gone"), file("a/stays"), folder("b"), file("b/old"))
    jail.unpack(
        file("a/.wh.gone", b""), file("b/.wh..wh..opq", b""), file("b/new"), file(".wh..wh.plnk", b""),
        lowers=[lower],
    )  # fmt: skip
    assert tree.is_whiteout((jail.root / "a/gone").lstat())
    assert os.getxattr(jail.root / "b", tree.OPAQUE) == b"y"
    assert listing(jail.root) == ["a", "b"]
    assert listing(jail.root / "b") == ["new"]


def test_whiteout_hides_only_lower_layers(jail: Jail) -> None:
    lower = jail.layer("lower", file("d/old"), file("f", b"old"))
    jail.unpack(file("d/mine"), file(".wh.d", b""), file("f", b"mine"), file(".wh.f", b""), lowers=[lower])
    assert (jail.root / "d/mine").exists()
    assert os.getxattr(jail.root / "d", tree.OPAQUE) == b"y"
    assert (jail.root / "f").read_bytes() == b"mine"


def test_directory_made_after_its_whiteout_is_opaque(jail: Jail) -> None:
    lower = jail.layer("lower", file("d/old"))
    jail.unpack(file(".wh.d", b""), folder("d"), file("d/new"), lowers=[lower])
    assert os.getxattr(jail.root / "d", tree.OPAQUE) == b"y"


@pytest.mark.parametrize("name", [".wh...", ".wh..", ".wh.", "a/.wh..."])
def test_whiteout_of_dot_names_is_rejected(jail: Jail, name: str) -> None:
    lower = jail.layer("lower", folder("a"))
    with pytest.raises(LayerRejected, match="whiteout"):
        jail.unpack(file(name, b""), lowers=[lower])


def test_whiteout_through_symlink_stays_inside(jail: Jail) -> None:
    lower = jail.layer("lower", folder("a"))
    jail.unpack(link("door", str(jail.outside)), file("door/.wh.victim", b""), lowers=[lower])
    assert (jail.outside / "victim").exists()


@pytest.mark.parametrize("first", [True, False])
def test_opaque_marker_keeps_entries_of_the_same_layer(jail: Jail, first: bool) -> None:
    """layer.md: the marker hides the layers below only, wherever it stands."""
    lower = jail.layer("lower", file("d/old"), file("d/sub/old"))
    marker = file("d/.wh..wh..opq", b"")
    entries = [file("d/new"), file("d/sub/new")]
    jail.unpack(*([marker, *entries] if first else [*entries, marker]), lowers=[lower])
    assert listing(jail.root / "d") == ["new", "sub"]
    assert os.getxattr(jail.root / "d", tree.OPAQUE) == b"y"


def test_opaque_root_hides_all_layers_below(jail: Jail) -> None:
    bottom = jail.layer("bottom", file("f"), folder("d", mode=0o700))
    jail.unpack(file(".wh..wh..opq", b""), file("d/g"), lowers=[bottom])
    assert os.getxattr(jail.root, tree.OPAQUE) == b"y"
    assert stat.S_IMODE((jail.root / "d").lstat().st_mode) == 0o755, "not that of the hidden one"
    with pytest.raises(LayerRejected, match="not there"):
        layer.unpack(iter([archive(hard("twin", "f"))]), str(jail.root), lowers=[bottom])


def test_directory_recreated_after_its_whiteout_hides_only_what_is_below(jail: Jail) -> None:
    lower = jail.layer("lower", file("d/old"), file("d/e/old"))
    jail.unpack(file(".wh.d", b""), file("d/e/new"), lowers=[lower])
    assert os.getxattr(jail.root / "d", tree.OPAQUE) == b"y"
    assert listing(jail.root / "d/e") == ["new"]


def test_whiteout_of_what_does_not_exist_is_kept(jail: Jail) -> None:
    lower = jail.layer("lower", folder("d"))
    jail.unpack(file("d/.wh.never", b""), file("e/f/.wh.never", b""), lowers=[lower])
    assert tree.is_whiteout((jail.root / "d/never").lstat())
    assert tree.is_whiteout((jail.root / "e/f/never").lstat())


def test_whiteout_in_the_lowest_layer_makes_nothing(jail: Jail) -> None:
    jail.unpack(file(".wh.x", b""), file("d/.wh..wh..opq", b""))
    assert listing(jail.root) == ["d"] and os.listxattr(jail.root / "d") == []


def test_whiteout_through_symlink_hides_in_the_linked_directory(jail: Jail) -> None:
    lower = jail.layer("lower", file("usr/bin/tool"), link("bin", "usr/bin"))
    jail.unpack(file("bin/.wh.tool", b""), lowers=[lower])
    assert tree.is_whiteout((jail.root / "usr/bin/tool").lstat())


def test_file_replaces_its_whiteout(jail: Jail) -> None:
    lower = jail.layer("lower", file("f", b"old"))
    jail.unpack(file(".wh.f", b""), file("f", b"new"), lowers=[lower])
    assert (jail.root / "f").read_bytes() == b"new"


# ---------------------------------------------------------------------------------------------- layers below


def test_parents_from_a_lower_layer_keep_its_attributes(jail: Jail) -> None:
    lower = jail.layer("lower", folder("tmp", mode=0o1777), folder("srv", uid=33, mode=0o750))
    jail.unpack(file("tmp/x"), file("srv/y"), lowers=[lower])
    assert stat.S_IMODE((jail.root / "tmp").lstat().st_mode) == 0o1777
    srv = (jail.root / "srv").lstat()
    assert (srv.st_uid, stat.S_IMODE(srv.st_mode), srv.st_mtime > MTIME) == (33, 0o750, True)


def test_symlink_of_a_lower_layer_is_followed(jail: Jail) -> None:
    """bin/tool above a root whose bin is a link to usr/bin."""
    lower = jail.layer("lower", folder("usr/bin", mode=0o751), link("bin", "usr/bin"))
    jail.unpack(file("bin/tool"), lowers=[lower])
    assert (jail.root / "usr/bin/tool").exists()
    assert stat.S_IMODE((jail.root / "usr/bin").lstat().st_mode) == 0o751
    assert not (jail.root / "bin").exists()


def test_symlink_of_a_lower_layer_stays_inside(jail: Jail) -> None:
    lower = jail.layer("lower", link("door", str(jail.outside)))
    jail.unpack(file("door/victim", b"changed"), lowers=[lower])
    assert (jail.root / str(jail.outside)[1:] / "victim").read_bytes() == b"changed"


def test_attributes_of_a_hidden_lower_directory_are_not_copied(jail: Jail) -> None:
    bottom = jail.layer("bottom", folder("d", mode=0o700))
    middle = jail.layer("middle", file(".wh.d", b""), lowers=[bottom])
    jail.unpack(file("d/f"), lowers=[middle, bottom])
    assert stat.S_IMODE((jail.root / "d").lstat().st_mode) == 0o755


def test_hard_link_to_a_lower_file_copies_it_up(jail: Jail) -> None:
    bottom = jail.layer("bottom", folder("d", mode=0o711), file("d/f", b"below", uid=4, mode=0o4755))
    jail.unpack(hard("twin", "d/f"), lowers=[bottom])
    twin = (jail.root / "twin").lstat()
    assert (jail.root / "twin").read_bytes() == b"below"
    assert (twin.st_uid, stat.S_IMODE(twin.st_mode), twin.st_nlink, twin.st_mtime) == (4, 0o4755, 2, MTIME)
    assert stat.S_IMODE((jail.root / "d").lstat().st_mode) == 0o711


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (tarfile.SYMTYPE, {"linkname": "/nowhere"}),
        (tarfile.FIFOTYPE, {}),
        (tarfile.CHRTYPE, {"devmajor": 1, "devminor": 3}),
        (tarfile.BLKTYPE, {"devmajor": 8, "devminor": 1}),
    ],
)
def test_hard_link_to_a_special_file_below_copies_it_up(
    jail: Jail, kind: bytes, fields: dict[str, int | str]
) -> None:
    bottom = jail.layer("bottom", (entry("d/s", kind, uid=7, gid=8, mode=0o640, **fields), b""))
    jail.unpack(hard("twin", "d/s"), lowers=[bottom])
    below, twin = (Path(bottom) / "d/s").lstat(), (jail.root / "twin").lstat()
    assert (twin.st_mode, twin.st_uid, twin.st_gid, twin.st_rdev, twin.st_mtime_ns, twin.st_nlink) == (
        below.st_mode, below.st_uid, below.st_gid, below.st_rdev, below.st_mtime_ns, 2,
    )  # fmt: skip
    assert (jail.root / "d/s").lstat().st_ino == twin.st_ino


@pytest.mark.parametrize("here", [True, False])
def test_hard_link_through_a_linked_directory_finds_the_file_below(jail: Jail, here: bool) -> None:
    """The link lies in this layer or below, its target's directory below."""
    door = link("door", "real/./deeper/..")
    bottom = jail.layer("bottom", folder("real/deeper"), file("real/f", b"below"), *([] if here else [door]))
    jail.unpack(*([door] if here else []), hard("twin", "door/f"), lowers=[bottom])
    assert (jail.root / "twin").read_bytes() == b"below"
    assert (jail.root / "real/f").lstat().st_nlink == 2


def test_hard_link_to_a_socket_below_is_made(jail: Jail) -> None:
    bottom = jail.layer("bottom", folder("d"))
    os.mknod(f"{bottom}/d/s", stat.S_IFSOCK | 0o600)
    jail.unpack(hard("twin", "d/s"), lowers=[bottom])
    assert stat.S_ISSOCK((jail.root / "twin").lstat().st_mode)


def test_hard_link_to_a_whited_out_file_is_rejected(jail: Jail) -> None:
    bottom = jail.layer("bottom", file("f"))
    with pytest.raises(LayerRejected):
        jail.unpack(file(".wh.f", b""), hard("twin", "f"), lowers=[bottom])
