"""Pulls: what a good image becomes, shared pulls, and content that must be rejected."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from image.auth import Auth
from image.blobs import Progress
from image.errors import (
    DigestMismatch,
    DiskFull,
    ImageNotFound,
    LayerRejected,
    ManifestInvalid,
    ManifestNotFound,
    PullDeadline,
    RegistryUnavailable,
    Unauthorized,
    UnsupportedMedia,
)
from image.image_store import ImageStore
from sandbox.host.flights import ShuttingDown
from tests.fakes.disk import small_disk
from tests.fakes.registry import (
    Corrupt,
    FakeRegistry,
    Hang,
    StallAfter,
    Status,
    make_layer,
)
from tests.kit.eventually import eventually
from tests.kit.pulls import BASE, QUICK, TOP, leftovers, open_store, pull_error

# ----------------------------------------------------------------------------------------------- good images


@pytest.mark.parametrize("compression", ["gzip", "zstd", "plain"])
@pytest.mark.parametrize("docker", [False, True])
async def test_pull_stores_layers_config_and_names(
    registry: FakeRegistry, store: ImageStore, compression: str, docker: bool
) -> None:
    digest = registry.put_image(
        "a/b", "1", [BASE, TOP], compression=compression, docker=docker,
        config={"Cmd": ["/bin/sh"], "User": "7:8", "Env": ["A=b"], "Volumes": {"/data": {}}, "Labels": None},
    )  # fmt: skip
    seen: list[Progress] = []
    image = await store.pull(f"{registry.address}/a/b:1", on_progress=seen.append)
    assert image.id == registry.config_id("a/b", "1")
    assert image.repo_tags == (f"{registry.address}/a/b:1",)
    assert image.repo_digests == (f"{registry.address}/a/b@{digest}",)
    assert image.config.cmd == ("/bin/sh",)
    assert (image.config.user, image.config.env, image.config.volumes) == ("7:8", ("A=b",), ("/data",))
    assert len(image.chain_ids) == 2 and image.size > 200_000
    assert (store.layers.path(image.chain_ids[1]) / "app").stat().st_size == 200_000
    assert {step.step for step in seen} == {"download", "unpack"}
    assert all(step.current <= step.total for step in seen)
    await store.close()
    assert leftovers(store) == []


async def test_second_pull_downloads_no_layer_and_gives_the_same_image(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.put_image("a", "1", [BASE, TOP])
    image = await store.pull(f"{registry.address}/a:1")
    blobs = sum("/blobs/" in path for path in registry.paths())
    seen: list[Progress] = []
    assert await store.pull(f"{registry.address}/a:1", on_progress=seen.append) == image
    # the configuration alone
    assert sum("/blobs/" in path for path in registry.paths()) == blobs + 1
    assert {step.step for step in seen} == {"present"}
    await store.close()


async def test_pull_after_close_fails(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [BASE])
    await store.close()
    with pytest.raises(ShuttingDown):
        await store.pull(f"{registry.address}/a:1")


async def test_close_cancels_a_pull_and_waits_for_its_cleanup(registry: FakeRegistry, tmp_path: Path) -> None:
    store = open_store(tmp_path, timing=msgspec.structs.replace(QUICK, stall_s=30.0))
    registry.put_image("a", "1", [TOP])
    registry.fail("/blobs/" + registry.layer_digests("a", "1")[0], StallAfter(1000))
    downloading = asyncio.Event()

    def on_progress(progress: Progress) -> None:
        if progress.step == "download":
            downloading.set()

    pull = asyncio.create_task(store.pull(f"{registry.address}/a:1", on_progress=on_progress))
    await downloading.wait()
    await store.close()
    assert leftovers(store) == [] and store.list() == ()
    with pytest.raises(ShuttingDown):
        await pull


@pytest.mark.parametrize("docker", [False, True])
async def test_pull_of_index_selects_the_node_platform(
    registry: FakeRegistry, store: ImageStore, docker: bool
) -> None:
    wrong = registry.put_image("a", "", [TOP], architecture="arm64", docker=docker)
    right = registry.put_image("a", "amd64", [BASE], docker=docker)
    arm, amd = ({"os": "linux", "architecture": name} for name in ("arm64", "amd64"))
    index = registry.put_index("a", "multi", [(wrong, arm), (right, amd)], docker=docker)
    image = await store.pull(f"{registry.address}/a:multi")
    assert image.id == registry.config_id("a", "amd64")
    assert image.repo_digests == (f"{registry.address}/a@{index}",)
    await store.close()


@pytest.mark.parametrize("first", ["arm64", "signature"])
async def test_pull_of_index_without_platforms_reads_the_configurations(
    registry: FakeRegistry, store: ImageStore, first: str
) -> None:
    if first == "arm64":
        other = registry.put_image("a", "", [TOP], architecture="arm64")
    else:
        kind = "application/vnd.oci.image.manifest.v1+json"
        config = {"mediaType": "application/vnd.example+json", "digest": "sha256:" + "0" * 64, "size": 2}
        document = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": []}
        other = registry.put_manifest("a", "", document, kind)
    right = registry.put_image("a", "right", [BASE])
    registry.put_index("a", "multi", [(other, None), (right, None)])
    image = await store.pull(f"{registry.address}/a:multi")
    assert image.id == registry.config_id("a", "right")
    await store.close()


@pytest.mark.parametrize("architecture", ["x86_64", "AMD64", "arm64"])
async def test_pull_trusts_the_platform_of_the_index_entry(
    registry: FakeRegistry, store: ImageStore, architecture: str
) -> None:
    digest = registry.put_image("a", "", [BASE], architecture=architecture)
    registry.put_index("a", "multi", [(digest, {"os": "Linux", "architecture": "x86_64"})])
    assert (await store.pull(f"{registry.address}/a:multi")).size > 0
    await store.close()


async def test_index_for_other_platforms_names_them(registry: FakeRegistry, store: ImageStore) -> None:
    arm = registry.put_image("a", "", [BASE], architecture="arm64")
    bare = registry.put_image("a", "", [TOP], architecture="s390x")
    registry.put_index("a", "multi", [(arm, {"os": "linux", "architecture": "arm64"}), (bare, None)])
    error = await pull_error(store, f"{registry.address}/a:multi")
    assert isinstance(error, ManifestNotFound) and "linux/arm64, linux/s390x" in str(error)


async def test_pull_with_null_fields_succeeds(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [], config={"Labels": None, "Cmd": ["/bin/sh"], "Volumes": {"/data": None}})
    data, kind = registry.manifests["a", "1"]
    registry.put_manifest("a", "1", json.loads(data) | {"layers": None, "annotations": None}, kind)
    image = await store.pull(f"{registry.address}/a:1")
    assert (image.chain_ids, image.config.cmd, image.config.volumes) == ((), ("/bin/sh",), ("/data",))
    await store.close()


async def test_user_of_5000_digits_is_rejected(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [BASE], config={"User": "1" * 5000})
    assert isinstance(await pull_error(store, f"{registry.address}/a:1"), ManifestInvalid)


async def test_pull_by_digest_adds_no_tag(registry: FakeRegistry, store: ImageStore) -> None:
    digest = registry.put_image("a", "1", [BASE])
    image = await store.pull(f"{registry.address}/a@{digest}")
    assert image.repo_tags == ()
    assert image.repo_digests == (f"{registry.address}/a@{digest}",)
    assert store.find(f"{registry.address}/a@{digest}") == image
    await store.close()


async def test_pull_of_same_content_under_two_names_adds_names_to_one_image(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.put_image("a", "1", [BASE])
    registry.put_image("b", "2", [BASE])
    await store.pull(f"{registry.address}/a:1")
    image = await store.pull(f"{registry.address}/b:2")
    assert image.repo_tags == (f"{registry.address}/a:1", f"{registry.address}/b:2")
    assert len(image.repo_digests) == 2
    await store.remove(f"{registry.address}/a:1")
    assert store.list() == ()
    with pytest.raises(ImageNotFound):
        store.find(f"{registry.address}/b:2")
    await store.close()


async def test_concurrent_pulls_download_a_shared_layer_once(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.put_image("a", "1", [BASE])
    registry.put_image("b", "1", [BASE, TOP])
    await asyncio.gather(store.pull(f"{registry.address}/a:1"), store.pull(f"{registry.address}/b:1"))
    base = registry.layer_digests("a", "1")[0]
    assert sum(path.endswith(base) for path in registry.paths()) == 1
    await store.close()


async def test_pull_with_first_layer_arriving_last_succeeds(
    registry: FakeRegistry, store: ImageStore
) -> None:
    layers = [make_layer({f"f{n}": bytes([n]) * 50_000, "last": str(n).encode()}) for n in range(20)]
    registry.put_image("a", "1", layers)
    registry.fail("/blobs/" + registry.layer_digests("a", "1")[0], Status(503, {"Retry-After": "1"}))
    image = await store.pull(f"{registry.address}/a:1")
    assert len(image.chain_ids) == 20
    await store.close()


# ---------------------------------------------------------------------------------------------- shared pulls


async def test_concurrent_pulls_of_one_reference_share_one_download(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.put_image("a", "1", [BASE])
    ref = f"{registry.address}/a:1"
    images = await asyncio.gather(store.pull(ref), store.pull(ref), store.pull(ref))
    assert len({image.id for image in images}) == 1
    assert sum("manifests" in path for path in registry.paths()) == 1
    await store.close()


async def test_concurrent_pulls_with_different_credentials_are_separate(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.sign_in = "basic"
    registry.put_image("a", "1", [BASE])
    ref = f"{registry.address}/a:1"
    good = Auth(username=registry.username, password=registry.password)
    answers = await asyncio.gather(store.pull(ref, good), store.pull(ref), return_exceptions=True)
    assert isinstance(answers[1], Unauthorized)
    assert not isinstance(answers[0], BaseException)
    await store.close()


async def test_shared_pull_continues_after_one_caller_is_cancelled(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.put_image("a", "1", [BASE])
    registry.fail("/manifests/1", Status(503, {"Retry-After": "1"}))
    ref = f"{registry.address}/a:1"
    first = asyncio.create_task(store.pull(ref))
    second = asyncio.create_task(store.pull(ref))
    await eventually(lambda: registry.seen, describe="the registry got a request")
    first.cancel()
    image = await second
    assert first.cancelled() and store.list() == (image,)
    await store.close()


async def test_pull_is_cancelled_with_its_last_caller(registry: FakeRegistry, tmp_path: Path) -> None:
    store = open_store(tmp_path, timing=msgspec.structs.replace(QUICK, stall_s=30.0))
    registry.put_image("a", "1", [TOP])
    registry.fail("/blobs/" + registry.layer_digests("a", "1")[0], StallAfter(1000))
    began = asyncio.Event()
    pull = asyncio.create_task(
        store.pull(
            f"{registry.address}/a:1", on_progress=lambda p: began.set() if p.step == "download" else None
        )
    )
    await began.wait()
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    await store.close()
    assert leftovers(store) == [] and store.list() == ()
    # the next pull works
    next_store = open_store(tmp_path)
    assert (await next_store.pull(f"{registry.address}/a:1")).size > 0
    await next_store.close()


async def test_pull_longer_than_pull_timeout_fails(registry: FakeRegistry, tmp_path: Path) -> None:
    store = open_store(
        tmp_path, timing=msgspec.structs.replace(QUICK, answer_s=30.0, stall_s=30.0), pull_timeout_s=0.2
    )
    registry.fail("/manifests/1", Hang())
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, PullDeadline) and error.timeout_s == 0.2


# ----------------------------------------------------------------------------------------------- bad content


async def test_pull_of_unknown_image_fails_without_retry(registry: FakeRegistry, store: ImageStore) -> None:
    error = await pull_error(store, f"{registry.address}/no/such:1")
    assert isinstance(error, ManifestNotFound)
    assert "MANIFEST_UNKNOWN" in str(error)
    assert len([p for p in registry.paths() if "manifests" in p]) == 1


async def test_layer_shorter_than_announced_is_rejected(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [TOP])
    digest = registry.layer_digests("a", "1")[0]
    registry.blobs[digest] = registry.blobs[digest][:-1]
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, (RegistryUnavailable, DigestMismatch))


async def test_layer_longer_than_announced_is_rejected(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [TOP])
    digest = registry.layer_digests("a", "1")[0]
    registry.blobs[digest] += b"more"
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, DigestMismatch) and "size" in error.what


@pytest.mark.parametrize("part", ["layer", "config", "manifest"])
async def test_pull_with_wrong_digest_is_rejected(
    registry: FakeRegistry, store: ImageStore, part: str
) -> None:
    digest = registry.put_image("a", "1", [BASE])
    wanted = {
        "layer": registry.layer_digests("a", "1")[0],
        "config": registry.config_id("a", "1"),
        "manifest": f"/manifests/{digest}",
    }[part]
    registry.fail(wanted, Corrupt(), times=9)
    error = await pull_error(store, f"{registry.address}/a@{digest}")
    assert isinstance(error, DigestMismatch)


async def test_layer_with_wrong_diff_id_is_rejected(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [BASE], diff_ids=["sha256:" + "0" * 64])
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, DigestMismatch) and "diff id" in error.what


async def test_layer_that_climbs_out_is_rejected_and_lower_layer_collected(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.put_image("a", "1", [BASE, make_layer({"../../escape": b"x"})])
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, LayerRejected)
    # the good one below waits for the next collection
    await store.collect()
    assert store.layers.usage.inodes == 0


@pytest.mark.parametrize("cut", [5, 2000])
async def test_layer_with_truncated_compression_is_rejected(
    registry: FakeRegistry, store: ImageStore, cut: int
) -> None:
    registry.put_image("a", "1", [TOP])
    data, kind = registry.manifests["a", "1"]
    manifest = json.loads(data)
    short = registry.blobs[manifest["layers"][0]["digest"]][:cut]
    manifest["layers"][0] |= {"digest": registry.put_blob(short), "size": len(short)}
    registry.put_manifest("a", "1", manifest, kind)
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, LayerRejected)


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
    ],
)
async def test_layer_of_unsupported_media_type_is_rejected(
    registry: FakeRegistry, store: ImageStore, media_type: str
) -> None:
    registry.put_image("a", "1", [BASE])
    data, kind = registry.manifests["a", "1"]
    manifest = json.loads(data)
    manifest["layers"][0]["mediaType"] = media_type
    registry.put_manifest("a", "1", manifest, kind)
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, UnsupportedMedia) and error.media_type == media_type


async def test_schema_1_manifest_is_rejected(registry: FakeRegistry, store: ImageStore) -> None:
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    registry.put_manifest("a", "1", {"schemaVersion": 1, "name": "a", "fsLayers": []}, kind)
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, UnsupportedMedia) and "schema 1" in str(error)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"<html>", b'{"schemaVersion": 2, "config": 5}', b"\xff"]
)
async def test_invalid_manifest_is_rejected(
    registry: FakeRegistry, store: ImageStore, content: bytes
) -> None:
    registry.put_manifest("a", "1", content, "application/vnd.oci.image.manifest.v1+json")
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, ManifestInvalid)


async def test_image_for_another_platform_is_rejected(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [BASE], architecture="s390x")
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, ManifestNotFound) and "linux/s390x" in str(error)


async def test_disk_full_while_unpacking_leaves_nothing(registry: FakeRegistry, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 600 << 10) as disk:
        store = open_store(disk)
        registry.put_image("a", "1", [make_layer({"big": bytes(2 << 20)})])
        error = await pull_error(store, f"{registry.address}/a:1")
        assert isinstance(error, DiskFull)
        store = open_store(disk)
        registry.put_image("b", "1", [make_layer({"small": b"fits"})])
        assert (await store.pull(f"{registry.address}/b:1")).size > 0
        await store.close()


async def test_disk_full_while_downloading_leaves_nothing(registry: FakeRegistry, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 100 << 10) as disk:
        store = open_store(disk)
        registry.put_image("a", "1", [TOP])
        error = await pull_error(store, f"{registry.address}/a:1")
        assert isinstance(error, DiskFull)


async def test_disk_without_free_inodes_leaves_nothing(registry: FakeRegistry, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20, inodes=30) as disk:
        store = open_store(disk)
        registry.put_image("a", "1", [make_layer({f"f{n}": b"" for n in range(40)})])
        error = await pull_error(store, f"{registry.address}/a:1")
        assert isinstance(error, DiskFull)
