"""The index, the layers and what is collected; also after a crash and a power cut."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from image import image_store, layers, tree_ops
from image.errors import DigestMismatch, ImageNotFound
from image.image_store import ImageStore
from image.index import Image, Index
from image.manifest import RunDefaults, chain_ids
from tests.fakes.registry import make_layer
from tests.kit.eventually import eventually

A, B = "sha256:" + "a1" * 32, "sha256:" + "a2" * 32
DIGEST = "sha256:" + "d" * 64


def image(id: str = A, **fields: object) -> Image:
    return msgspec.structs.replace(Image(id=id, size=1), **fields)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    index = Index(tmp_path)
    index.load()
    return index


# ------------------------------------------------------------------------------------- index


def test_every_kind_of_reference_finds_the_image(index: Index) -> None:
    added = index.add(
        image(
            repo_tags=("docker.io/library/box:latest", "host.test/box:2"),
            repo_digests=(f"docker.io/library/box@{DIGEST}",),
        )
    )
    for ref in (
        "box", "box:latest", "docker.io/library/box:latest", "host.test/box:2", f"box@{DIGEST}",
        f"box:whatever@{DIGEST}", A, A.removeprefix("sha256:"), A[:20], A[7:20],
    ):  # fmt: skip
        assert index.find(ref) == added, ref


@pytest.mark.parametrize(
    "ref", ["", "box", "box:2", "a3", "sha256:", DIGEST, f"x@{DIGEST}", "Not A Name", "../x"]
)
def test_unknown_reference_is_not_found(index: Index, ref: str) -> None:
    index.add(image(repo_tags=("host.test/box:2",)))
    with pytest.raises(ImageNotFound):
        index.find(ref)
    assert index.remove(ref) is None


def test_ambiguous_id_is_not_found_with_a_reason(index: Index) -> None:
    index.add(image(A))
    index.add(image(B))
    with pytest.raises(ImageNotFound):
        index.find("a")
    near = "sha256:" + "a1" * 31 + "ff"
    index.add(image(near))
    with pytest.raises(ImageNotFound, match="2 images"):
        index.find("a1a1")


def test_name_wins_over_the_beginning_of_an_id(index: Index) -> None:
    index.add(image(A))
    named = index.add(image(B, repo_tags=("docker.io/library/a1a1:latest",)))
    assert index.find("a1a1") == named


def test_tag_moves_to_the_image_added_last(index: Index) -> None:
    index.add(image(A, repo_tags=("host.test/box:1",), repo_digests=("host.test/box@" + DIGEST,)))
    index.add(image(B, repo_tags=("host.test/box:1",)))
    assert index.find("host.test/box:1").id == B
    assert index.find(A).repo_tags == ()
    assert index.find(A).repo_digests == ("host.test/box@" + DIGEST,)


def test_names_of_one_image_accumulate_and_are_removed_together(index: Index) -> None:
    index.add(image(repo_tags=("host.test/a:1",)))
    added = index.add(image(repo_tags=("host.test/b:1",)))
    assert added.repo_tags == ("host.test/a:1", "host.test/b:1")
    assert index.remove("host.test/b:1") == added
    assert index.list() == ()
    assert index.remove("host.test/a:1") is None


def test_untag_removes_one_name_and_is_idempotent(index: Index) -> None:
    index.add(image(repo_tags=("host.test/a:1", "host.test/a:2")))
    index.untag("host.test/a:1")
    index.untag("host.test/a:1")
    assert index.find(A).repo_tags == ("host.test/a:2",)


def test_index_is_the_same_after_a_restart(index: Index, tmp_path: Path) -> None:
    added = index.add(image(repo_tags=("host.test/a:1",), created="2024-01-01T00:00:00Z"))
    again = Index(tmp_path)
    again.load()
    assert again.list() == (added,)
    assert again.find("host.test/a:1") == added


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b'{"id": "sha256:../x", "size": 1}', b"\x00" * 100, b'{"x":' + b"[" * 100_000],
)
def test_broken_entry_is_set_aside_and_others_are_loaded(
    index: Index, tmp_path: Path, content: bytes
) -> None:
    kept = index.add(image(A))
    index.add(image(B))
    entry(tmp_path, B).write_bytes(content)
    (tmp_path / "images" / "half.new").write_bytes(b"{")
    again = Index(tmp_path)
    again.load()
    assert again.list() == (kept,)
    assert "cannot be read" in again.set_aside[B]
    assert not (tmp_path / "images" / "half.new").exists()
    assert again.remove(B[:20]) is None and again.set_aside == {}
    assert list((tmp_path / "images").iterdir()) == [entry(tmp_path, A)]


@pytest.mark.parametrize("kind", ["directory", "fifo", "link to nothing", "gigabytes"])
def test_entry_that_is_no_file_is_set_aside_and_can_be_removed(
    index: Index, tmp_path: Path, kind: str
) -> None:
    kept = index.add(image(A))
    path = entry(tmp_path, B)
    match kind:
        case "directory":
            (path / "deep").mkdir(parents=True)
        case "fifo":
            os.mkfifo(path)
        case "link to nothing":
            path.symlink_to("nowhere")
        case _:
            with path.open("wb") as file:
                file.truncate(8 << 30)
    again = Index(tmp_path)
    again.load()
    assert again.list() == (kept,) and B in again.set_aside
    again.remove(B)
    assert again.set_aside == {} and not os.path.lexists(path)


def entry(root: Path, id: str) -> Path:
    """Return the file of an image."""
    return root / "images" / (id.removeprefix("sha256:") + ".json")


def stored_by_an_earlier_version(root: Path, id: str) -> None:
    """Write the entry of an image whose User today's pulls reject."""
    digests = (f"host.test/old@sha256:{'d' * 64}",)
    old = image(
        id, repo_tags=("host.test/old:1",), repo_digests=digests, config=RunDefaults(user="1" * (8 << 20))
    )
    (root / "images").mkdir(parents=True, exist_ok=True)
    entry(root, id).write_bytes(msgspec.json.encode(old))


def test_stored_image_with_huge_user_is_set_aside_and_named(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = index.add(image(A))
    stored_by_an_earlier_version(tmp_path, B)
    again = Index(tmp_path)
    again.load()
    assert again.list() == (kept,)
    reason = "User: user characters: 8388608 is above the limit of 1024 (registry.limits.user_characters)"
    assert again.set_aside == {B: f"host.test/old:1, host.test/old@sha256:{'d' * 64}: {reason}"}
    assert B in caplog.text and "host.test/old:1" in caplog.text and len(caplog.text) < 1000
    with pytest.raises(ImageNotFound):
        again.find("host.test/old:1")


@pytest.mark.parametrize("ref", [B, B.removeprefix("sha256:"), B[:15], "host.test/old:1", "host.test/old:1@"])
def test_image_that_was_set_aside_is_removed_by_any_reference(tmp_path: Path, ref: str) -> None:
    stored_by_an_earlier_version(tmp_path, B)
    index = Index(tmp_path)
    index.load()
    assert index.remove(ref.replace("@", f"@sha256:{'d' * 64}")) is None
    assert index.set_aside == {} and list((tmp_path / "images").iterdir()) == []


def test_removal_by_a_beginning_of_a_good_and_an_aside_id_is_refused(index: Index, tmp_path: Path) -> None:
    near = B[:-1] + ("0" if B[-1] != "0" else "1")
    index.add(image(near))
    stored_by_an_earlier_version(tmp_path, B)
    again = Index(tmp_path)
    again.load()
    with pytest.raises(ImageNotFound, match="ambiguous"):
        again.remove(B[:20])
    assert again.find(near) and B in again.set_aside


def test_image_that_was_set_aside_is_usable_after_it_was_stored_again(tmp_path: Path) -> None:
    stored_by_an_earlier_version(tmp_path, B)
    index = Index(tmp_path)
    index.load()
    index.add(image(B))
    again = Index(tmp_path)
    again.load()
    assert index.set_aside == again.set_aside == {}
    assert again.find(B).id == B


# -------------------------------------------------------------------------- layers and images


class Bench:
    """A store, filled without a registry."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.used: set[str] = set()
        self.store = self.restart()

    def restart(self) -> ImageStore:
        self.store = ImageStore(self.root, in_use=lambda: self.used)
        self.store.load()
        return self.store

    async def add(self, name: str, *contents: str) -> Image:
        tars = [make_layer({text: text.encode()}) for text in contents]
        diff_ids = [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]
        chain = chain_ids(diff_ids)
        for n, tar in enumerate(tars):
            if self.store.layers.find(chain[n]) is None:
                with self.store.layers.staging() as stage:
                    (stage / "blob").write_bytes(tar)
                    await self.store.layers.unpack(chain[n], diff_ids[n], chain[:n], stage / "blob")
        id = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        return self.store.index.add(Image(id=id, size=1, chain_ids=chain, repo_tags=(f"host.test/{name}:1",)))

    def here(self, image: Image) -> list[bool]:
        return [self.store.layers.path(chain_id).exists() for chain_id in image.chain_ids]

    def leftovers(self) -> list[Path]:
        return [p for name in ("staging", "trash") for p in (self.root / "images" / name).iterdir()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_layers_are_removed_with_the_last_image_that_names_them(bench: Bench) -> None:
    one = await bench.add("one", "base", "x")
    two = await bench.add("two", "base", "y")
    assert one.chain_ids[0] == two.chain_ids[0]
    await bench.store.remove("host.test/one:1")
    assert bench.here(one) == [True, False] and bench.here(two) == [True, True]
    await bench.store.remove("host.test/two:1")
    assert bench.here(two) == [False, False]
    assert bench.leftovers() == []
    usage = bench.store.fs_usage()
    assert (usage.used_bytes, usage.inodes_used) == (0, 0)


async def test_layers_used_by_a_container_are_kept(bench: Bench) -> None:
    one = await bench.add("one", "base", "x")
    bench.used.update(one.chain_ids)
    await bench.store.remove(one.id)
    assert bench.store.list() == () and bench.here(one) == [True, True]
    bench.used.clear()
    await bench.store.collect()
    assert bench.here(one) == [False, False]


async def test_pinned_layers_are_kept(bench: Bench) -> None:
    one = await bench.add("one", "base")
    with bench.store.layers.pinned(one.chain_ids):
        await bench.store.remove(one.id)
        assert bench.here(one) == [True]
    await bench.store.collect()
    assert bench.here(one) == [False]


async def test_concurrent_removals_all_succeed(bench: Bench) -> None:
    one = await bench.add("one", "base")
    answers = await asyncio.gather(*(bench.store.remove(ref) for ref in (one.id, "host.test/one:1", one.id)))
    assert [bool(answer) for answer in answers] == [True, False, False]


async def test_usage_counts_layers_and_entries(bench: Bench) -> None:
    await bench.add("one", "base", "x")
    usage = bench.store.fs_usage()
    # two layers of a root and a file, and the entry
    assert usage.inodes_used == 5 and usage.used_bytes > 0
    assert Path(usage.mountpoint).is_dir()
    assert bench.restart().fs_usage() == usage


async def test_restart_keeps_images_and_deletes_incomplete_ones(bench: Bench) -> None:
    one = await bench.add("one", "base", "x")
    for name in ("staging", "trash"):
        folder = bench.root / "images" / name / "left" / "fs"
        folder.mkdir(parents=True)
        (folder / "file").write_text("half")
    bench.restart()
    assert bench.store.list() == (one,) and bench.here(one) == [True, True]
    assert bench.leftovers() == []


async def test_undeletable_layer_does_not_block_other_deletions(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.add("one", "base", "x", "y", "z", "last")
    remove = tree_ops.remove

    def failing_remove(path: Path) -> None:
        if (path / "fs" / "x").exists():
            raise PermissionError(1, "not that one", str(path))
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(tree_ops, "remove", failing_remove)
        await bench.store.remove("host.test/one:1")
    assert len(bench.leftovers()) == 1 and "not that one" in caplog.text
    bench.restart()
    assert bench.leftovers() == []


async def test_layer_deeper_than_recursion_is_removed_and_does_not_block_a_start(bench: Bench) -> None:
    image = await bench.add("one", "base")
    deep = bench.store.layers.path(image.chain_ids[0])
    for parent in (deep, bench.root / "images/trash"):
        at = os.open(parent, os.O_RDONLY)
        for _ in range(2000):
            os.mkdir("d", dir_fd=at)
            below = os.open("d", os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
        os.close(at)
    bench.restart()
    assert bench.leftovers() == []
    await bench.store.remove("host.test/one:1")
    assert bench.leftovers() == [] and bench.here(image) == [False]


def mark_of(bench: Bench, image: Image) -> Path:
    return bench.store.layers.path(image.chain_ids[0]).parent / "unsynced"


async def test_layers_are_synced_after_a_delay(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "SYNC_DELAY_S", 0.05)
    one = await bench.add("one", "base")
    await bench.store.collect()
    assert mark_of(bench, one).exists()
    await eventually(lambda: not mark_of(bench, one).exists(), describe="the layer is synced")
    assert not bench.store.layers.has_unsynced
    await bench.store.close()


async def test_close_syncs_without_delay(bench: Bench) -> None:
    one = await bench.add("one", "base")
    await bench.store.collect()
    await bench.store.close()
    assert not mark_of(bench, one).exists()


async def test_layer_removed_before_the_sync_is_not_synced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(layers, "_syncfs", synced.append)
    await bench.add("one", "base")
    await bench.store.remove("host.test/one:1")
    assert not bench.store.layers.has_unsynced
    await bench.store.close()
    assert synced == []


async def test_layer_unsynced_at_a_restart_is_synced_later(bench: Bench) -> None:
    one = await bench.add("one", "base")
    bench.restart()
    assert bench.store.layers.has_unsynced and mark_of(bench, one).exists()
    await bench.store.collect()
    await bench.store.close()
    assert not mark_of(bench, one).exists()


async def test_layer_made_again_during_a_sync_stays_marked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await bench.add("one", "base")
    store = bench.store.layers
    (chain_id,) = one.chain_ids
    again = msgspec.structs.replace(store._layers[chain_id])
    monkeypatch.setattr(layers, "_syncfs", lambda root: store._unsynced.update({chain_id: again}))
    store.sync()
    assert mark_of(bench, one).exists() and store.has_unsynced


async def test_power_failure_drops_unsynced_layers_only(bench: Bench) -> None:
    old = await bench.add("old", "base")
    bench.store.layers.sync()
    new = await bench.add("new", "other")
    mark = bench.store.layers.path(new.chain_ids[0]).parent / "unsynced"
    assert mark.exists()
    assert not (bench.store.layers.path(old.chain_ids[0]).parent / "unsynced").exists()
    mark.write_text("another boot")
    bench.restart()
    assert bench.store.list() == (old,)
    assert bench.here(new) == [False] and bench.leftovers() == []


async def test_damaged_layer_drops_its_image_only(bench: Bench) -> None:
    one = await bench.add("one", "base")
    two = await bench.add("two", "other")
    (bench.store.layers.path(one.chain_ids[0]).parent / "layer.json").write_text("{")
    bench.restart()
    assert bench.store.list() == (two,)


async def test_layer_with_wrong_diff_id_leaves_nothing(bench: Bench) -> None:
    layers = bench.store.layers
    with layers.staging() as stage:
        (stage / "blob").write_bytes(make_layer({"a": b""}))
        with pytest.raises(DigestMismatch):
            await layers.unpack(DIGEST, DIGEST, (), stage / "blob")
    await bench.store.collect()
    assert layers.chain_ids() == () and bench.leftovers() == []
