"""Archives of the preload directory, at start and later; images that the configuration pins."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from image.errors import ImageNotFound, ImagePinned
from image.image_store import ImageStore
from image.index import Index
from image.options import ImageOptions
from image.preload import Preloader
from sandbox.host.tasks import Tasks
from tests.kit.eventually import eventually
from tests.kit.images import Image, Layer, write_docker_archive, write_oci_layout


def make(word: str) -> Image:
    return Image(layers=(Layer().add("etc/word", word),), cmd=("/bin/sh",))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "state")
    store.load()
    return store


@contextlib.asynccontextmanager
async def preloading(store: ImageStore, folder: Path) -> AsyncIterator[list[str]]:
    """Run a Preloader; yields the names of the files that it imports."""
    imported: list[str] = []

    async def load(path: Path) -> object:
        imported.append(path.name)
        return await store.import_archive(path)

    tasks = Tasks()
    preloader = Preloader(
        tasks,
        folder,
        folder.parent / "preloaded.json",
        load,  # type: ignore[arg-type]
        lambda id: store.index.get(id) is not None,
    )
    tasks.spawn(preloader.run(), "preload")
    try:
        yield imported
    finally:
        await tasks.close()


def tags(store: ImageStore) -> set[str]:
    return {tag for image in store.list() for tag in image.repo_tags}


async def test_archives_at_start_and_later_are_imported_once(
    store: ImageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "preload"
    folder.mkdir()
    write_oci_layout(folder / "a.tar", {"registry.test/a:1": make("a")})
    (folder / "notes.txt").write_text("not an archive")
    (folder / ".hidden.tar").write_text("not an archive")
    async with preloading(store, folder) as imported:
        await eventually(lambda: tags(store) == {"registry.test/a:1"})
        write_docker_archive(tmp_path / "b.tar", {"registry.test/b:1": make("b")})
        (tmp_path / "b.tar").rename(folder / "b.tar")
        await eventually(lambda: tags(store) == {"registry.test/a:1", "registry.test/b:1"})
    assert imported == ["a.tar", "b.tar"]
    assert "preload: imported b.tar" in caplog.text and "registry.test/b:1" in caplog.text
    async with preloading(store, folder) as imported:  # the next start
        write_oci_layout(folder / "c.tar", {"registry.test/c:1": make("c")})
        await eventually(lambda: "registry.test/c:1" in tags(store))
    assert imported == ["c.tar"]
    await store.close()


async def test_archive_whose_image_was_removed_is_imported_again(store: ImageStore, tmp_path: Path) -> None:
    folder = tmp_path / "preload"
    folder.mkdir()
    write_oci_layout(folder / "a.tar", {"registry.test/a:1": make("a")})
    for _ in range(2):
        async with preloading(store, folder):
            await eventually(lambda: tags(store) == {"registry.test/a:1"})
        await store.remove("registry.test/a:1")
    await store.close()


async def test_broken_archive_is_logged_and_imported_when_it_is_mended(
    store: ImageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "preload"
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"broken" * 1000)
    write_oci_layout(folder / "b.tar", {"registry.test/b:1": make("b")})
    async with preloading(store, folder) as imported:
        await eventually(lambda: tags(store) == {"registry.test/b:1"})
        assert "a.tar cannot be imported" in caplog.text
        write_oci_layout(folder / "a.tar", {"registry.test/a:1": make("a")})
        await eventually(lambda: tags(store) == {"registry.test/a:1", "registry.test/b:1"})
    assert imported == ["a.tar", "b.tar", "a.tar"]
    await store.close()


async def test_archive_that_is_still_written_is_waited_for(store: ImageStore, tmp_path: Path) -> None:
    folder = tmp_path / "preload"
    write_oci_layout(tmp_path / "a.tar", {"registry.test/a:1": make("a")})
    data = (tmp_path / "a.tar").read_bytes()
    async with preloading(store, folder) as imported:  # the directory is made
        await eventually(folder.is_dir)
        with (folder / "a.tar").open("wb") as file:
            for at in range(0, len(data), len(data) // 4):
                file.write(data[at : at + len(data) // 4])
                file.flush()
                await asyncio.sleep(0.1)
        await eventually(lambda: tags(store) == {"registry.test/a:1"})
    assert imported == ["a.tar"]
    await store.close()


async def test_directory_that_cannot_be_made_is_logged(
    store: ImageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    async with preloading(store, tmp_path / "file" / "preload"):
        await eventually(lambda: "no image is preloaded" in caplog.text)
    await store.close()


# ------------------------------------------------------------------------------------ pinned


@pytest.mark.parametrize(
    ("pattern", "pinned"),
    [
        ("registry.test/a:1", True),
        ("registry.test/*", True),
        ("*/a:*", True),
        ("registry.test/a", False),
        ("registry.test/b*", False),
    ],
)
async def test_image_with_a_pinned_name_is_kept(tmp_path: Path, pattern: str, pinned: bool) -> None:
    store = ImageStore(tmp_path / "state", ImageOptions(pinned=(pattern,)))
    store.load()
    write_oci_layout(tmp_path / "a.tar", {"registry.test/a:1": make("a")})
    (image,) = await store.import_archive(tmp_path / "a.tar")
    assert image.pinned == store.find(image.id).pinned == pinned
    if pinned:
        with pytest.raises(ImagePinned, match="take it out to remove"):
            await store.remove(image.id)
        assert store.list()
    else:
        await store.remove(image.id)
        with pytest.raises(ImageNotFound):
            store.find(image.id)
    await store.close()


async def test_image_is_pinned_as_the_configuration_in_force_says(tmp_path: Path) -> None:
    write_oci_layout(tmp_path / "a.tar", {"registry.test/a:1": make("a")})
    store = ImageStore(tmp_path / "state", ImageOptions(pinned=("registry.test/*",)))
    store.load()
    await store.import_archive(tmp_path / "a.tar")
    store.index.untag("registry.test/a:1")
    names = [name for image in store.list() for name in (*image.repo_tags, *image.repo_digests)]
    assert [image.pinned for image in store.list()] == [bool(names)]
    await store.close()
    later = Index(tmp_path / "state/images")
    later.load()
    assert [image.pinned for image in later.list()] == [False]
