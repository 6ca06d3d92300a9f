"""Unpacking hostile and broken layers: nothing outside of the root changes, and every limit holds."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import stat
import subprocess
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from image import layer
from image.budget import Limits, Stopped, Watch
from image.errors import DiskFull, ImageError, LayerRejected
from tests.fakes.disk import small_disk
from tests.kit.layers import (
    Jail,
    archive,
    entry,
    file,
    folder,
    hard,
    link,
    listing,
    make_jail,
    padded,
    pax_records,
    raw_header,
    raw_header_gnu,
    with_pax,
)  # fmt: skip


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Jail]:
    with make_jail(tmp_path) as jail:
        yield jail


# ----------------------------------------------------------------------------------- paths that lead outside


def test_absolute_path_begins_at_the_layers_root(jail: Jail) -> None:
    target = jail.outside / "victim"
    jail.unpack(file(str(target), b"changed"))
    assert (jail.root / str(target)[1:]).read_bytes() == b"changed"


@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped", "../../../../../../tmp/escaped", ".."])
def test_path_that_climbs_out_is_rejected(jail: Jail, name: str) -> None:
    with pytest.raises(LayerRejected, match="climbs out"):
        jail.unpack(file(name))


def test_dots_that_stay_inside_are_resolved(jail: Jail) -> None:
    jail.unpack(folder("a"), file("a/./b/../c"))
    assert (jail.root / "a/c").exists()


@pytest.mark.parametrize(
    "target", ["{outside}", "../../outside", "/../../{outside}", "../" * 20 + "{outside}"]
)
def test_path_through_symlink_stays_inside(jail: Jail, target: str) -> None:
    """The link's target is made inside, where a container with this root would find it."""
    jail.unpack(link("door", target.format(outside=jail.outside)), file("door/victim", b"changed"))
    assert (jail.outside / "victim").read_text() == "untouched"
    inside = [p for p in jail.root.rglob("victim") if p.read_bytes() == b"changed"]
    assert len(inside) == 1


def test_path_through_chain_of_symlinks_stays_inside(jail: Jail) -> None:
    jail.unpack(
        link("a", "b"), link("b", "/c"), link("c", "../.."), file("a/etc/passwd", b"x"),
    )  # fmt: skip
    assert (jail.root / "etc/passwd").read_bytes() == b"x"


def test_symlink_loop_is_rejected(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="too many symbolic links"):
        jail.unpack(link("a", "b"), link("b", "a"), file("a/f"))


def test_file_replaces_symlink_of_its_name(jail: Jail) -> None:
    jail.unpack(link("f", str(jail.outside / "victim")), file("f", b"new"))
    assert not (jail.root / "f").is_symlink()
    assert (jail.root / "f").read_bytes() == b"new"


def test_symlink_entry_does_not_change_its_target(jail: Jail) -> None:
    jail.unpack((entry("f", tarfile.SYMTYPE, linkname=str(jail.outside / "victim"), mode=0o777, uid=5), b""))
    assert (jail.root / "f").lstat().st_uid == 5


def test_directory_replaced_by_symlink_is_not_followed_at_the_end(jail: Jail) -> None:
    """Directory attributes are set last: the name may stand for a way out by then."""
    jail.unpack(folder("d", mode=0o777, uid=12), link("d", str(jail.outside / "folder")))
    assert (jail.root / "d").is_symlink()


def test_attributes_of_a_replaced_directory_are_not_set_on_the_links_target(jail: Jail) -> None:
    jail.unpack(folder("etc", mode=0o755), folder("d", mode=0o777, uid=12), link("d", "etc"))
    etc = (jail.root / "etc").lstat()
    assert (stat.S_IMODE(etc.st_mode), etc.st_uid) == (0o755, 0)


def test_replaced_directory_is_not_written_to(jail: Jail) -> None:
    jail.unpack(folder("d/e"), file("d/e/f"), link("d", str(jail.outside)), file("d/e/g", b"x"))
    assert not (jail.outside / "e").exists()


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../outside/victim", "{outside}/victim", "door/victim", "missing"]
)
def test_hard_link_to_outside_is_rejected(jail: Jail, target: str) -> None:
    with pytest.raises(LayerRejected):
        jail.unpack(link("door", str(jail.outside)), hard("stolen", target.format(outside=jail.outside)))
    assert not (jail.root / "stolen").exists()


def test_hard_link_to_symlink_links_the_symlink(jail: Jail) -> None:
    jail.unpack(link("l", str(jail.outside / "victim")), hard("twin", "l"), file("twin", b"new"))
    assert (jail.root / "l").is_symlink()
    assert (jail.root / "twin").read_bytes() == b"new"


@pytest.mark.parametrize("target", [".", "d", "f", "dev"])
def test_hard_link_to_directory_or_itself_is_rejected(jail: Jail, target: str) -> None:
    with pytest.raises(LayerRejected):
        jail.unpack(folder("d"), folder("dev"), file("f"), hard("f" if target == "f" else "x", target))


def test_hard_link_onto_its_own_file_keeps_it(jail: Jail) -> None:
    jail.unpack(file("a", b"data"), hard("b", "a"), hard("b", "a"), hard("a", "b"))
    assert (jail.root / "a").read_bytes() == (jail.root / "b").read_bytes() == b"data"


def test_file_as_parent_is_rejected(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="not a directory"):
        jail.unpack(file("a"), file("a/b"))


# ---------------------------------------------------------------------------------------------- sparse files


SPARSE = bytes(4096) + b"data" + bytes(4092) + b"tail"


def test_sparse_file_with_pax_map_is_unpacked(jail: Jail) -> None:
    info = entry("made/up/name", size=8)
    jail.unpack_bytes(
        with_pax(info, b"datatail", GNU__sparse__map="4096,4,8192,4", GNU__sparse__size="8196",
                 GNU__sparse__name="holes")
    )  # fmt: skip
    assert (jail.root / "holes").read_bytes() == SPARSE
    assert not (jail.root / "made").exists()


def test_sparse_file_with_map_before_data_is_unpacked(jail: Jail) -> None:
    stored = padded(b"2\n4096\n4\n8192\n4\n") + b"datatail"
    info = entry("x", size=len(stored))
    jail.unpack_bytes(
        with_pax(info, stored, GNU__sparse__major="1", GNU__sparse__minor="0",
                 GNU__sparse__name="holes", GNU__sparse__realsize="8196")
    )  # fmt: skip
    assert (jail.root / "holes").read_bytes() == SPARSE


def test_sparse_file_of_old_gnu_tar_is_unpacked(jail: Jail) -> None:
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
def test_impossible_sparse_map_is_rejected(jail: Jail, sparse_map: str) -> None:
    data = with_pax(entry("x", size=8), b"datatail", GNU__sparse__map=sparse_map, GNU__sparse__size="16")
    with pytest.raises(LayerRejected, match="sparse"):
        jail.unpack_bytes(data)


# -------------------------------------------------------------------------------- limits and broken archives


def test_too_many_entries_are_rejected(jail: Jail) -> None:
    with pytest.raises(
        LayerRejected, match=r"layer entries: 11 is above the limit of 10 \(registry.limits.layer_entries\)"
    ):
        jail.unpack(*(file(f"f{n}") for n in range(11)), limits=Limits(layer_entries=10))


def test_too_many_bytes_are_rejected_before_they_are_read(jail: Jail) -> None:
    info = entry("huge", size=1 << 40)
    with pytest.raises(LayerRejected, match="layer bytes: 1099511627776 is above the limit of 1000 "):
        jail.unpack_bytes(raw_header_gnu(info), limits=Limits(layer_bytes=1000))
    assert not (jail.root / "huge").exists()


def test_sparse_hole_counts_as_bytes(jail: Jail) -> None:
    data = with_pax(entry("x", size=0), b"", GNU__sparse__map="0,0", GNU__sparse__size=str(1 << 50))
    with pytest.raises(LayerRejected, match="layer bytes: "):
        jail.unpack_bytes(data)


def test_segments_of_all_sparse_files_count_together(jail: Jail) -> None:
    one = with_pax(entry("x"), b"", GNU__sparse__map=",".join(["0,0"] * 60), GNU__sparse__size="0")
    jail.unpack_bytes(one, limits=Limits(layer_segments=100))
    with pytest.raises(LayerRejected, match=r"layer segments: 101 is above the limit of 100"):
        jail.unpack_bytes(one + one, limits=Limits(layer_segments=100))


def test_empty_segments_of_a_sparse_file_are_ignored(jail: Jail) -> None:
    sparse_map = "0,0,4096,0,4096,4,8192,0,8192,4,8196,0"
    jail.unpack_bytes(
        with_pax(entry("holes", size=8), b"datatail", GNU__sparse__map=sparse_map, GNU__sparse__size="8196")
    )
    assert (jail.root / "holes").read_bytes() == SPARSE


@pytest.mark.parametrize("form", ["gnu", "posix 0.0", "posix 0.1", "posix 1.0"])
def test_sparse_file_of_gnu_tar_keeps_its_holes(jail: Jail, tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "holes").open("wb") as sparse:
        for at in (0, 5 << 20, 20 << 20):
            sparse.seek(at)
            sparse.write(b"data" * 1024)
        sparse.truncate(64 << 20)  # ends in a hole
    kind, _, version = form.partition(" ")
    options = [f"--format={kind}", *([f"--sparse-version={version}"] if version else [])]
    made = tmp_path / "layer.tar"
    subprocess.run(["tar", "-c", "--sparse", *options, "-f", made, "-C", source, "holes"], check=True)
    assert made.stat().st_size < 1 << 20
    usage = jail.unpack_bytes(made.read_bytes())
    unpacked = jail.root / "holes"
    assert unpacked.read_bytes() == (source / "holes").read_bytes()
    assert unpacked.stat().st_blocks * 512 < 1 << 20
    assert usage.bytes < 1 << 20


def test_endless_bytes_after_the_end_are_rejected(jail: Jail) -> None:
    def chunks() -> Iterator[bytes]:
        yield archive(file("f"))
        for number in itertools.count():
            assert number < 100, "read on"
            yield bytes(1 << 16)

    with pytest.raises(LayerRejected, match=r"layer tail bytes: \d+ is above the limit of 1000000 "):
        layer.unpack(chunks(), str(jail.root), limits=Limits(layer_tail_bytes=1_000_000))


def test_path_deeper_than_the_limit_is_rejected(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="layer depth: 301 is above the limit of 256"):
        jail.unpack(file("d/" * 300 + "f"))


@pytest.mark.parametrize("below", [False, True])
def test_link_target_deeper_than_the_limit_is_rejected(jail: Jail, below: bool) -> None:
    """146 bytes of layer would make a tree 1,990 directories deep."""
    deep = link("door", "/".join(["d"] * 1990))
    lowers = [jail.layer("lower", deep)] if below else []
    with pytest.raises(LayerRejected, match="layer depth: 257 is above the limit of 256"):
        jail.unpack(*([] if below else [deep]), file("door/f"), lowers=lowers)


def test_name_longer_than_255_bytes_is_rejected(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="File name too long"):
        jail.unpack(file("n" * 256))


def test_huge_extension_header_is_rejected(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="extension bytes: 1073741824 is above"):
        jail.unpack_bytes(raw_header(entry("x", tarfile.XHDTYPE, size=1 << 30)))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [0, 100_000])
def test_endless_extension_headers_are_rejected_in_bounded_memory(jail: Jail, kind: bytes, size: int) -> None:
    """Hundreds of megabytes of distinct records come from a layer of half a megabyte."""

    def headers() -> Iterator[bytes]:
        for number in itertools.count():
            body = b"".join(
                b"32 SCHILY.xattr.user.%08d=x\n" % (number * 10_000 + n) for n in range(size // 32)
            )
            yield raw_header(entry("x", kind, size=len(body))) + padded(body)

    tracemalloc.start()
    try:
        with pytest.raises(LayerRejected, match=r"extensions bytes|global bytes|pax records"):
            layer.unpack(headers(), str(jail.root))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_endless_global_headers_between_entries_are_rejected(jail: Jail) -> None:
    def headers() -> Iterator[bytes]:
        body = pax_records(comment="x" * 1_000_000)
        for number in itertools.count():
            yield raw_header(entry("x", tarfile.XGLTYPE, size=len(body))) + padded(body)
            yield raw_header(entry(f"f{number}"))

    with pytest.raises(LayerRejected, match=r"what follows f.*global bytes"):
        layer.unpack(headers(), str(jail.root))


def test_unknown_pax_records_are_not_kept(jail: Jail) -> None:
    records = {f"VENDOR__{n}": "x" for n in range(20_000)}
    jail.unpack_bytes(with_pax(entry("placeholder"), b"", path="name", **records))
    assert listing(jail.root) == ["name"]


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
def test_broken_extension_header_makes_nothing_else(jail: Jail, record: bytes) -> None:
    header = raw_header(entry("x", tarfile.XHDTYPE, size=len(record)))
    data = header + padded(record) + raw_header(entry("f"))
    with contextlib.suppress(LayerRejected):
        jail.unpack_bytes(data)
    assert set(listing(jail.root)) <= {"f", "x"}


@pytest.mark.parametrize("cut", [100, 512, 600, 1000])
def test_truncated_archive_is_rejected(jail: Jail, cut: int) -> None:
    data = archive(file("f", b"x" * 2000))
    with pytest.raises(LayerRejected, match="ends in the middle"):
        jail.unpack_bytes(data[:cut])


def test_bytes_that_are_not_a_tar_are_rejected(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="not a tar header"):
        jail.unpack_bytes(hashlib.sha512(b"seed").digest() * 16)


def test_negative_size_is_rejected(jail: Jail) -> None:
    header = bytearray(raw_header(entry("f")))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(LayerRejected, match="impossible size"):
        jail.unpack_bytes(bytes(header))


def test_zero_byte_in_a_name_is_rejected(jail: Jail) -> None:
    with pytest.raises(LayerRejected, match="zero byte"):
        jail.unpack_bytes(with_pax(entry("x"), b"", path="a\0b"))


def test_unpack_ends_when_stop_is_set(jail: Jail) -> None:
    stop = threading.Event()
    watch = Watch(Limits(), "unpack_s", stop)

    def chunks() -> Iterator[bytes]:
        data = archive(*(file(f"f{n}") for n in range(100)))
        yield data[:10240]
        stop.set()
        yield data[10240:]

    with pytest.raises(Stopped):
        layer.unpack(chunks(), str(jail.root), watch=watch)
    assert len(listing(jail.root)) < 100


@pytest.mark.parametrize("part", ["data of a file", "data of a contiguous file", "after the end"])
def test_unpack_ends_when_stop_is_set_in_the_middle_of(jail: Jail, part: str) -> None:
    """Gigabytes may follow one header, or the archive's end."""
    stop = threading.Event()
    watch = Watch(Limits(), "unpack_s", stop)
    first = {
        "data of a file": raw_header_gnu(entry("f", size=1 << 40)),
        "data of a contiguous file": raw_header_gnu(entry("l", b"7", size=1 << 40)),
        "after the end": archive(file("f")),
    }[part]

    def chunks() -> Iterator[bytes]:
        yield first
        for number in itertools.count():
            if number == 3:
                stop.set()
            assert number < 10, "read on"
            yield bytes(1 << 16)

    with pytest.raises(Stopped):
        layer.unpack(chunks(), str(jail.root), watch=watch, limits=Limits(layer_bytes=1 << 50))


def test_unpack_on_full_disk_raises_disk_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk, pytest.raises(DiskFull):
        (disk / "root").mkdir()
        layer.unpack(iter([archive(file("big", bytes(2 << 20)))]), str(disk / "root"))


def test_rejection_is_an_image_error(jail: Jail) -> None:
    with pytest.raises(ImageError):
        jail.unpack(file("../x"))
