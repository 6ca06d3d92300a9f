"""Importing files: OCI layouts and docker-archives, good and broken."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from image.errors import ArchiveInvalid, DigestMismatch, DiskFull, ImageError, ManifestNotFound
from image.image_store import ImageStore
from tests.fakes.disk import small_disk
from tests.fakes.registry import compress
from tests.kit.images import (
    Form,
    Image,
    Layer,
    Packing,
    descriptor,
    digest_of,
    index_of,
    to_json,
    write_docker_archive,
    write_oci_layout,
    write_tar,
)

NAME = "registry.test/box:1"


def make(word: str = "one", packing: Packing = Packing.GZIP, **fields: object) -> Image:
    layers = (Layer(packing).add("etc/word", word), Layer(packing).add("bin/sh", b"#!" * 5000, mode=0o755))
    return Image(layers=layers, cmd=("/bin/sh",), **fields)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "state")
    store.load()
    return store


def leftovers(store: ImageStore) -> list[Path]:
    root = Path(store.fs_usage().mountpoint)
    return [path for name in ("staging", "trash") for path in (root / name).iterdir()]


async def refused(store: ImageStore, path: Path, name: str = "") -> ImageError:
    with pytest.raises(ImageError) as caught:
        await store.import_archive(path, name=name)
    await store.close()
    assert leftovers(store) == [] and store.list() == ()
    return caught.value


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("wrap", ["plain", "gzip", "zstd"])
async def test_oci_layout_is_imported(store: ImageStore, tmp_path: Path, packing: Packing, wrap: str) -> None:
    image, file = make(packing=packing), tmp_path / "a.tar"
    write_oci_layout(file, {NAME: image})
    file.write_bytes(compress(file.read_bytes(), wrap))
    (found,) = await store.import_archive(file)
    assert found.id == image.id
    assert found.repo_tags == (NAME,)
    assert found.repo_digests == (f"registry.test/box@{digest_of(image.manifest())}",)
    assert (store.layers.path(found.chain_ids[0]) / "etc/word").read_text() == "one"
    await store.close()
    assert leftovers(store) == []


async def test_oci_layout_directory_is_imported(store: ImageStore, tmp_path: Path) -> None:
    write_oci_layout(tmp_path / "a.tar", {NAME: make()})
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 has it
        tar.extractall(tmp_path / "layout")
    (found,) = await store.import_archive(tmp_path / "layout")
    assert found.repo_tags == (NAME,)
    await store.close()


async def test_docker_archive_is_imported(store: ImageStore, tmp_path: Path) -> None:
    one, two = make("one", form=Form.DOCKER), make("two", form=Form.DOCKER)
    write_docker_archive(tmp_path / "a.tar", {"box:1": one, "box:2": two})
    found = await store.import_archive(tmp_path / "a.tar")
    assert [image.id for image in found] == [one.id, two.id]
    assert found[0].repo_tags == ("docker.io/library/box:1",)
    # the manifest was made here: its digest would name nothing in a registry
    assert found[0].repo_digests == ()
    # the upper layers are alike but stand on others
    assert len({chain for image in found for chain in image.chain_ids}) == 4
    await store.close()


async def test_docker_archive_with_linked_layers_is_imported(store: ImageStore, tmp_path: Path) -> None:
    """As `docker save` once did for a layer that occurs twice."""
    layer = Layer().add("f", "1")
    image = Image(layers=(layer,), form=Form.DOCKER)
    members = [{"Config": "c.json", "RepoTags": None, "Layers": ["b/layer.tar"]}]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("c.json", image.config()), ("manifest.json", to_json(members)), ("a/layer.tar", layer.tar())
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../a/layer.tar"
        tar.addfile(link)
    (found,) = await store.import_archive(tmp_path / "a.tar")
    assert found.id == image.id and found.repo_tags == ()
    assert store.find(found.id[:20]) == found
    await store.close()


async def test_archive_of_both_formats_takes_names_of_manifest_json(
    store: ImageStore, tmp_path: Path
) -> None:
    """`docker save` of today: an OCI layout, and manifest.json with the full names."""
    image = make()
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
    for blob in (image.manifest(), *image.blobs()):
        files["blobs/" + digest_of(blob).replace(":", "/")] = blob
    entry = descriptor(image.form.manifest, image.manifest())
    notes = {"annotations": {"org.opencontainers.image.ref.name": "1"}}
    files["index.json"] = to_json({"schemaVersion": 2, "manifests": [entry | notes]})
    config = "blobs/" + image.id.replace(":", "/")
    files["manifest.json"] = to_json([{"Config": config, "RepoTags": [NAME], "Layers": []}])
    write_tar(tmp_path / "a.tar", files)
    (found,) = await store.import_archive(tmp_path / "a.tar")
    assert (found.id, found.repo_tags) == (image.id, (NAME,))
    await store.close()


async def test_archive_with_nested_index_is_imported(store: ImageStore, tmp_path: Path) -> None:
    arm, amd = make("arm", architecture="arm64"), make("amd")
    index = index_of([arm, amd])
    files = {"oci-layout": b"{}"}
    for blob in (index, *(b for image in (arm, amd) for b in (image.manifest(), *image.blobs()))):
        files["blobs/" + digest_of(blob).replace(":", "/")] = blob
    notes = {"annotations": {"io.containerd.image.name": NAME}}
    files["index.json"] = to_json(
        {"schemaVersion": 2, "manifests": [descriptor(Form.OCI.index, index) | notes]}
    )
    write_tar(tmp_path / "a.tar", files)
    (found,) = await store.import_archive(tmp_path / "a.tar")
    assert found.id == amd.id
    assert found.repo_digests == (f"registry.test/box@{digest_of(index)}",)
    await store.close()


async def test_name_option_replaces_the_archives_names(store: ImageStore, tmp_path: Path) -> None:
    write_oci_layout(tmp_path / "a.tar", {NAME: make()})
    (found,) = await store.import_archive(tmp_path / "a.tar", name="mine")
    assert found.repo_tags == ("docker.io/library/mine:latest",)
    await store.close()


async def test_name_option_for_two_images_is_rejected(store: ImageStore, tmp_path: Path) -> None:
    write_oci_layout(tmp_path / "a.tar", {"box:1": make("1"), "box:2": make("2")})
    assert "2 images" in str(await refused(store, tmp_path / "a.tar", name="mine"))


# ------------------------------------------------------------------------------------ broken


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\x1f\x8brubbish",
        b"\x28\xb5\x2f\xfdrubbish",
        gzip.compress(b"garbage" * 500),
        bytes(10240),
    ],
)
async def test_file_that_is_not_an_archive_is_rejected(
    store: ImageStore, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    assert isinstance(await refused(store, tmp_path / "a.tar"), ArchiveInvalid)


async def test_missing_file_and_empty_directory_are_rejected(store: ImageStore, tmp_path: Path) -> None:
    assert isinstance(await refused(store, tmp_path / "absent"), ArchiveInvalid)
    (tmp_path / "empty").mkdir()
    assert isinstance(await refused(store, tmp_path / "empty"), ArchiveInvalid)


@pytest.mark.parametrize(
    "files",
    [
        {"manifest.json": b"{"},
        {"manifest.json": b"[]"},
        {"manifest.json": b'[{"Config": "absent", "Layers": []}]'},
        {"manifest.json": b'[{"Config": "../../etc/passwd", "Layers": []}]'},
        {"index.json": b"{"},
        {"index.json": b'{"schemaVersion": 2, "manifests": []}'},
        {
            "index.json": to_json(
                {"schemaVersion": 2, "manifests": [descriptor(Form.OCI.manifest, b"absent")]}
            )
        },
    ],
)
async def test_incomplete_archive_is_rejected(
    store: ImageStore, tmp_path: Path, files: dict[str, bytes]
) -> None:
    write_tar(tmp_path / "a.tar", files)
    await refused(store, tmp_path / "a.tar")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    await refused(store, folder)


async def test_archive_with_wrong_digest_is_rejected(store: ImageStore, tmp_path: Path) -> None:
    image = make()
    write_oci_layout(tmp_path / "a.tar", {NAME: image})
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 has it
        tar.extractall(tmp_path / "layout")
    digest = digest_of(image.layers[0].packed())
    blob = tmp_path / "layout/blobs" / digest.replace(":", "/")
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    assert isinstance(await refused(store, tmp_path / "layout"), DigestMismatch)


async def test_docker_archive_with_wrong_layer_is_rejected(store: ImageStore, tmp_path: Path) -> None:
    image = make(form=Form.DOCKER)
    layers = {"0/layer.tar": Layer().add("evil").tar(), "1/layer.tar": image.layers[1].tar()}
    members = [{"Config": "c.json", "RepoTags": [NAME], "Layers": list(layers)}]
    write_tar(
        tmp_path / "a.tar",
        {"c.json": image.config(), "manifest.json": to_json(members), **layers},
    )
    assert isinstance(await refused(store, tmp_path / "a.tar"), DigestMismatch)


async def test_archive_for_another_platform_is_rejected(store: ImageStore, tmp_path: Path) -> None:
    write_oci_layout(tmp_path / "a.tar", {NAME: make(architecture="s390x")})
    assert isinstance(await refused(store, tmp_path / "a.tar"), ManifestNotFound)


async def test_import_on_full_disk_leaves_nothing(tmp_path: Path) -> None:
    write_oci_layout(tmp_path / "a.tar", {NAME: Image(layers=(Layer().add("big", bytes(4 << 20)),))})
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        store = ImageStore(disk)
        store.load()
        assert isinstance(await refused(store, tmp_path / "a.tar"), DiskFull)
