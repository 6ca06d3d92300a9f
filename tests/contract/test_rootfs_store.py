"""The contract of root filesystem stores (`RootfsStore`), checked for each module of `image/stores`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pkgutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import image.stores
from image.errors import DiskFull, ImageError, ImageNotFound
from image.idmap import IdMap, find_obstacle
from image.layers import LayerStore
from image.manifest import chain_ids
from image.rootfs import HostTree
from image.stores import RootfsStore
from image.stores.overlay import OverlayStore
from sandbox.errors import InvalidSpec
from sandbox.host import syscalls
from sandbox.host.ids import IdRange
from tests.fakes.disk import small_disk
from tests.fakes.registry import make_layer

# by file name: a new store is added here and nowhere else
MAKERS: Mapping[str, Callable[[Path, LayerStore], RootfsStore]] = {"overlay": OverlayStore}
FILES = [module.name for module in pkgutil.iter_modules(image.stores.__path__)]


class Site:
    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.layers = LayerStore(root / "images")
        self.layers.load()
        self.name = name
        self.store = self.restarted()

    def restarted(self) -> RootfsStore:
        """Return a new store object, as after a crash."""
        return MAKERS[self.name](self.root, self.layers)

    async def stack(self, *layers: Mapping[str, bytes | str | None]) -> tuple[str, ...]:
        tars = [make_layer(layer) for layer in layers]
        diff_ids = [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]
        chain = chain_ids(diff_ids)
        for n, tar in enumerate(tars):
            if self.layers.find(chain[n]) is None:
                with self.layers.staging() as stage:
                    (stage / "blob").write_bytes(tar)
                    await self.layers.unpack(chain[n], diff_ids[n], chain[:n], stage / "blob")
        return chain

    @property
    def target(self) -> Path:
        return self.root / "target"

    def mounts(self) -> list[str]:
        """Return the mount points below the site's directory."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if line.split()[4].startswith(f"{self.root}/")]

    def nothing_left(self) -> bool:
        return not self.mounts() and not self.store.keys()


@pytest.fixture(params=FILES)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, request.param)
    yield site
    for key in tuple(site.store.keys()):
        asyncio.run(site.store.down(key, site.target))
    assert site.mounts() == []


def test_every_store_has_a_maker_here() -> None:
    assert set(FILES) == set(MAKERS)


async def test_read_finds_files_as_a_process_with_that_root(site: Site) -> None:
    chain = await site.stack({"etc": None, "etc/passwd": b"root:x:0:0::/:\n", "big": b"x" * 100})
    rootfs = await site.store.up("c1", chain, site.target)
    assert site.store.read(rootfs, "etc/passwd", 100) == b"root:x:0:0::/:\n"
    assert site.store.read(rootfs, "etc/group", 100) == b""
    assert site.store.read(rootfs, "etc", 100) == b"", "a directory is not a file"
    with pytest.raises(InvalidSpec, match="larger than 99 bytes"):
        site.store.read(rootfs, "big", 99)


async def test_tree_is_mounted_at_its_target(site: Site) -> None:
    rootfs = await site.store.up("c1", await site.stack({"a": b"1"}), site.target)
    if isinstance(rootfs, HostTree):
        assert rootfs.path == str(site.target)
        assert (site.target / "a").read_bytes() == b"1"


async def test_layers_merge_and_are_not_written(site: Site) -> None:
    chain = await site.stack(
        {"a": None, "a/gone": b"1", "a/old": b"1", "b": None, "b/hidden": b"1", "same": b"low"},
        {"a/.wh.gone": b"", "b/.wh..wh..opq": b"", "b/new": b"2", "same": b"high"},
    )
    await site.store.up("c1", chain, site.target)
    assert sorted(p.name for p in (site.target / "a").iterdir()) == ["old"]
    assert sorted(p.name for p in (site.target / "b").iterdir()) == ["new"]
    assert (site.target / "same").read_bytes() == b"high"
    (site.target / "same").write_bytes(b"mine")
    (site.target / "a/old").unlink()
    await site.store.down("c1", site.target)
    assert site.nothing_left()
    await site.store.up("c2", chain, site.target)
    assert (site.target / "same").read_bytes() == b"high"
    assert (site.target / "a/old").exists()


async def test_containers_of_one_image_are_isolated(site: Site) -> None:
    chain = await site.stack({"f": b"1"})
    other = site.root / "other"
    await site.store.up("c1", chain, site.target)
    await site.store.up("c2", chain, other)
    (site.target / "f").write_bytes(b"2")
    assert (other / "f").read_bytes() == b"1"
    assert set(site.store.keys()) == {"c1", "c2"}
    await site.store.down("c2", other)
    assert (site.target / "f").read_bytes() == b"2"


async def test_root_directory_has_the_images_attributes(site: Site) -> None:
    chain = await site.stack({"f": b"1"})
    site.layers.path(chain[0]).chmod(0o711)
    os.chown(site.layers.path(chain[0]), 5, 6)
    await site.store.up("c1", chain, site.target)
    info = site.target.stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o711, 5, 6)


async def test_image_without_layers_is_mounted(site: Site) -> None:
    await site.store.up("c1", (), site.target)
    (site.target / "f").write_bytes(b"1")
    assert [p.name for p in site.target.iterdir()] == ["f"]


async def test_stack_of_128_layers_are_mounted(site: Site) -> None:
    """More than the options of one mount could name by their paths."""
    chain = await site.stack(*({f"f{n}": str(n).encode()} for n in range(128)))
    await site.store.up("c1", chain, site.target)
    assert len(list(site.target.iterdir())) == 128


async def test_path_with_overlayfs_separators_is_mounted(tmp_path: Path) -> None:
    for name in FILES:
        odd = tmp_path / f"{name},a:b\\c"
        odd.mkdir()
        site = Site(odd, name)
        await site.store.up("c1", await site.stack({"f": b"1"}), site.target)
        assert (site.target / "f").read_bytes() == b"1"
        await site.store.down("c1", site.target)


async def test_usage_counts_what_was_written(site: Site) -> None:
    chain = await site.stack({"base": bytes(1 << 20)})
    await site.store.up("c1", chain, site.target)
    assert site.store.usage("c1").bytes < 100_000
    (site.target / "folder").mkdir()
    (site.target / "folder/big").write_bytes(os.urandom(1 << 20))
    os.sync()
    usage = site.store.usage("c1")
    assert usage.bytes >= 1 << 20 and usage.inodes >= 2
    assert site.store.usage("unknown").bytes == 0


async def test_down_is_idempotent(site: Site) -> None:
    await site.store.down("never", site.root / "nowhere")
    await site.store.up("c1", await site.stack({"f": b"1"}), site.target)
    await site.store.down("c1", site.target)
    await site.store.down("c1", site.target)
    assert site.nothing_left()


async def test_down_after_a_crash_removes_everything(site: Site) -> None:
    await site.store.up("c1", await site.stack({"f": b"1"}), site.target)
    site.store = site.restarted()
    assert set(site.store.keys()) == {"c1"}
    await site.store.down("c1", site.target)
    assert site.nothing_left()


async def test_down_with_an_open_file_succeeds(site: Site) -> None:
    await site.store.up("c1", await site.stack({"f": b"1"}), site.target)
    with (site.target / "f").open("rb") as file:
        await site.store.down("c1", site.target)
        assert file.read() == b"1"
    assert site.nothing_left()


async def test_up_after_a_crash_starts_from_the_image(site: Site) -> None:
    chain = await site.stack({"f": b"1"})
    await site.store.up("c1", chain, site.target)
    (site.target / "old").write_bytes(b"1")
    site.store = site.restarted()
    await site.store.up("c1", chain, site.target)
    assert sorted(p.name for p in site.target.iterdir()) == ["f"]
    assert site.mounts() == [str(site.target)]


PLAIN = ("/kept", "/var/lib/engine")


async def test_plain_directory_has_the_images_content_and_takes_overlays(site: Site) -> None:
    chain = await site.stack({"kept": None, "kept/a": None, "kept/a/file": b"1", "kept/link": "/etc"})
    kept = site.layers.path(chain[0]) / "kept"
    kept.chmod(0o2750)
    os.chown(kept, 5, 6)
    os.setxattr(kept / "a/file", "user.note", b"2")
    await site.store.up("c1", chain, site.target, plain=PLAIN)
    made = site.target / "kept"
    info = made.stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o2750, 5, 6)
    assert (made / "a/file").read_bytes() == b"1" and (made / "link").readlink() == Path("/etc")
    assert os.getxattr(made / "a/file", "user.note") == b"2"
    engine = site.target / "var/lib/engine"
    assert stat.S_IMODE(engine.stat().st_mode) == 0o755
    for name in ("lower", "upper", "work", "merged"):
        (engine / name).mkdir()
    (engine / "lower/file").touch()
    options = ",".join(f"{name}dir={engine / name}" for name in ("lower", "upper", "work"))
    syscalls.mount("o", engine / "merged", "overlay", 0, options)
    (engine / "merged/file").unlink()
    assert (engine / "upper/file").is_char_device(), "a whiteout, which an overlay could not hold"
    before = site.store.usage("c1").bytes
    (made / "big").write_bytes(os.urandom(1 << 20))
    os.sync()
    assert site.store.usage("c1").bytes >= before + (1 << 20)
    await site.store.down("c1", site.target)
    assert site.nothing_left()
    assert (kept / "a/file").exists() and not (kept / "big").exists()


async def test_plain_directory_is_removed_after_a_crash_and_made_again(site: Site) -> None:
    chain = await site.stack({"kept": None, "kept/file": b"1"})
    await site.store.up("c1", chain, site.target, plain=PLAIN)
    (site.target / "kept/file").write_bytes(b"changed")
    site.store = site.restarted()
    await site.store.up("c1", chain, site.target, plain=PLAIN)
    assert (site.target / "kept/file").read_bytes() == b"1"
    assert len(site.mounts()) == 1 + len(PLAIN)
    await site.store.down("c1", site.target)
    await site.store.down("c1", site.target)
    assert site.nothing_left()


async def test_plain_directory_follows_links_inside_the_root_only(site: Site) -> None:
    outside = site.root / "outside"
    outside.mkdir()
    chain = await site.stack({"kept": str(outside), "var": None, "var/lib": b"a file"})
    await site.store.up("c1", chain, site.target, plain=PLAIN)
    assert (site.target / "var/lib").read_bytes() == b"a file", "nothing is mounted there"
    assert not any(mount.startswith(str(outside)) for mount in site.mounts())
    assert list(outside.iterdir()) == []


async def test_plain_directory_that_cannot_be_filled_leaves_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = await site.stack({"kept": None, "kept/file": b"1"})
    monkeypatch.setenv("PATH", str(site.root))
    with pytest.raises(ImageError):
        await site.store.up("c1", chain, site.target, plain=PLAIN)
    assert site.nothing_left()


async def test_up_with_a_missing_layer_names_it(site: Site) -> None:
    with pytest.raises(ImageNotFound, match="sha256:gone"):
        await site.store.up("c1", ("sha256:gone",), site.target)
    assert site.nothing_left()


async def test_failed_up_leaves_nothing(site: Site) -> None:
    chain = await site.stack({"f": b"1"})
    site.target.write_bytes(b"a file where the mount should go")
    with pytest.raises(ImageError):
        await site.store.up("c1", chain, site.target)
    assert site.nothing_left()


async def test_up_on_full_disk_leaves_nothing(tmp_path: Path) -> None:
    for name in FILES:
        with small_disk(tmp_path / name, 1 << 20, inodes=16) as disk:
            site = Site(disk, name)
            chain = await site.stack({"f": b"1"})
            while True:
                try:
                    (disk / f"fill{len(list(disk.iterdir()))}").touch()
                except OSError:
                    break
            with pytest.raises(DiskFull):
                await site.store.up("c1", chain, site.target)
            assert site.nothing_left()


async def test_cancelled_up_leaves_nothing(site: Site) -> None:
    chain = await site.stack({"f": b"1"})
    task = asyncio.create_task(site.store.up("c1", chain, site.target))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert site.nothing_left()


@pytest.mark.parametrize("key", ["", ".", "..", "a/b", "../x", "x" * 300])
async def test_key_that_is_not_a_name_is_rejected(site: Site, key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        await site.store.down(key, site.target)


async def test_mount_is_nosuid_and_nodev(site: Site) -> None:
    await site.store.up("c1", await site.stack({"f": b"1"}), site.target)
    flags = os.statvfs(site.target).f_flag
    assert flags & os.ST_NOSUID and flags & os.ST_NODEV


# -------------------------------------------------------------------------------- mapped owners

IDS = IdMap(
    uids=(IdRange(inside=0, outside=70000, length=1000),),
    gids=(IdRange(inside=0, outside=80000, length=1000),),
)


async def test_layers_are_mounted_with_mapped_owners(site: Site) -> None:
    chain = await site.stack({"low": b"1"}, {"top": b"2", "folder": None})
    await site.store.up("key", chain, site.target, IDS)
    for name in (".", "low", "top", "folder"):
        status = (site.target / name).stat()
        assert (status.st_uid, status.st_gid) == (70000, 80000), name
    # the same layers, with their own owners, beside it
    other = site.root / "other"
    await site.store.up("other", chain, other)
    assert (other / "low").stat().st_uid == 0
    for key, target in (("other", other), ("key", site.target), ("key", site.target)):
        await site.store.down(key, target)
    assert site.nothing_left()
    assert all(layer.stat().st_uid == 0 for layer in (site.root / "images/layers").iterdir())


async def test_writes_over_mapped_layers_do_not_change_them(site: Site) -> None:
    chain = await site.stack({"file": b"of the layer"})
    await site.store.up("key", chain, site.target, IDS)
    os.chown(site.target / "file", 70005, 80006)
    (site.target / "file").write_text("of the container")
    status = (site.target / "file").stat()
    assert (status.st_uid, status.st_gid) == (70005, 80006)
    await site.store.down("key", site.target)
    await site.store.up("key", chain, site.target)
    assert (site.target / "file").read_bytes() == b"of the layer"
    await site.store.down("key", site.target)


def test_filesystem_without_idmapped_mounts_is_reported(tmp_path: Path) -> None:
    assert find_obstacle(_made(tmp_path / "able")) == ""
    point = _made(tmp_path / "unable")
    subprocess.run(["mount", "-t", "ramfs", "husk-test", str(point)], check=True)
    try:
        assert "cannot map ids" in find_obstacle(_made(point / "scratch"))
    finally:
        subprocess.run(["umount", str(point)], check=True)


def _made(path: Path) -> Path:
    path.mkdir()
    return path
