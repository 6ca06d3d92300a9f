"""Pulling from a registry that behaves, and from one that does not."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from image.auth import Auth
from image.blobs import Progress
from image.errors import (
    DigestMismatch,
    DiskFull,
    ImageError,
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
from image.registry import Timing
from image.settings import Settings
from tests.fakes.disk import small_disk
from tests.fakes.registry import (
    Corrupt,
    FakeRegistry,
    Hang,
    StallAfter,
    Status,
    Truncate,
    make_layer,
)

QUICK = Timing(connect_s=2, stall_s=0.3, answer_s=1, attempts=3, backoff_s=0.01, backoff_limit_s=2)
BASE = make_layer({"etc": None, "etc/os": b"test", "bin": None, "bin/sh": b"#!" * 4000})
TOP = make_layer({"etc/.wh.os": b"", "app": os.urandom(200_000)})


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry().serving() as serving:
        yield serving


def make_library(root: Path, **changes: object) -> ImageStore:
    settings = msgspec.structs.replace(Settings(timing=QUICK), **changes)
    library = ImageStore(root / "state", settings)
    library.load()
    return library


@pytest.fixture
def library(tmp_path: Path) -> ImageStore:
    return make_library(tmp_path)


def leftovers(library: ImageStore) -> list[str]:
    """What is neither a layer nor an index entry."""
    root = Path(library.fs_usage().mountpoint)
    return [str(path) for name in ("staging", "trash") for path in (root / name).iterdir()]


async def refused(library: ImageStore, ref: str, auth: Auth | None = None) -> ImageError:
    """The error of a pull that must fail and leave nothing."""
    with pytest.raises(ImageError) as caught:
        await library.pull(ref, auth)
    await library.close()
    assert leftovers(library) == []
    assert library.list() == ()
    return caught.value


# ----------------------------------------------------------------------------- good registries


@pytest.mark.parametrize("compression", ["gzip", "zstd", "plain"])
@pytest.mark.parametrize("docker", [False, True])
async def test_pull(registry: FakeRegistry, library: ImageStore, compression: str, docker: bool) -> None:
    digest = registry.put_image(
        "a/b", "1", [BASE, TOP], compression=compression, docker=docker,
        config={"Cmd": ["/bin/sh"], "User": "7:8", "Env": ["A=b"], "Volumes": {"/data": {}}, "Labels": None},
    )  # fmt: skip
    seen: list[Progress] = []
    image = await library.pull(f"{registry.address}/a/b:1", on_progress=seen.append)
    assert image.id == registry.config_id("a/b", "1")
    assert image.repo_tags == (f"{registry.address}/a/b:1",)
    assert image.repo_digests == (f"{registry.address}/a/b@{digest}",)
    assert image.config.cmd == ("/bin/sh",)
    assert (image.config.user, image.config.env, image.config.volumes) == ("7:8", ("A=b",), ("/data",))
    assert len(image.chain_ids) == 2 and image.size > 200_000
    assert (library.layers.path(image.chain_ids[1]) / "app").stat().st_size == 200_000
    assert {step.step for step in seen} == {"download", "unpack"}
    assert all(step.current <= step.total for step in seen)
    await library.close()
    assert leftovers(library) == []
    again = await library.pull(f"{registry.address}/a/b:1")
    assert again == image
    await library.close()


@pytest.mark.parametrize("docker", [False, True])
async def test_an_index_is_resolved_by_platform(
    registry: FakeRegistry, library: ImageStore, docker: bool
) -> None:
    wrong = registry.put_image("a", "", [TOP], architecture="arm64", docker=docker)
    right = registry.put_image("a", "amd64", [BASE], docker=docker)
    arm, amd = ({"os": "linux", "architecture": name} for name in ("arm64", "amd64"))
    index = registry.put_index("a", "multi", [(wrong, arm), (right, amd)], docker=docker)
    image = await library.pull(f"{registry.address}/a:multi")
    assert image.id == registry.config_id("a", "amd64")
    assert image.repo_digests == (f"{registry.address}/a@{index}",)
    await library.close()


async def test_by_digest_there_is_no_tag(registry: FakeRegistry, library: ImageStore) -> None:
    digest = registry.put_image("a", "1", [BASE])
    image = await library.pull(f"{registry.address}/a@{digest}")
    assert image.repo_tags == ()
    assert image.repo_digests == (f"{registry.address}/a@{digest}",)
    assert library.find(f"{registry.address}/a@{digest}") == image
    await library.close()


async def test_one_content_under_two_names(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [BASE])
    registry.put_image("b", "2", [BASE])
    await library.pull(f"{registry.address}/a:1")
    image = await library.pull(f"{registry.address}/b:2")
    assert image.repo_tags == (f"{registry.address}/a:1", f"{registry.address}/b:2")
    assert len(image.repo_digests) == 2
    await library.remove(f"{registry.address}/a:1")
    assert library.list() == ()
    with pytest.raises(ImageNotFound):
        library.find(f"{registry.address}/b:2")
    await library.close()


async def test_shared_layers_are_fetched_once(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [BASE])
    registry.put_image("b", "1", [BASE, TOP])
    await asyncio.gather(library.pull(f"{registry.address}/a:1"), library.pull(f"{registry.address}/b:1"))
    base = registry.layer_digests("a", "1")[0]
    assert sum(path.endswith(base) for path in registry.paths()) == 1
    await library.close()


async def test_many_layers_in_any_order_of_arrival(registry: FakeRegistry, library: ImageStore) -> None:
    layers = [make_layer({f"f{n}": bytes([n]) * 50_000, "last": str(n).encode()}) for n in range(20)]
    registry.put_image("a", "1", layers)
    registry.fail("/blobs/" + registry.layer_digests("a", "1")[0], Status(503, {"Retry-After": "1"}))
    image = await library.pull(f"{registry.address}/a:1")
    assert len(image.chain_ids) == 20
    await library.close()


# ------------------------------------------------------------------------------------ joining


async def test_the_same_pull_twice_is_one(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [BASE])
    ref = f"{registry.address}/a:1"
    images = await asyncio.gather(library.pull(ref), library.pull(ref), library.pull(ref))
    assert len({image.id for image in images}) == 1
    assert sum("manifests" in path for path in registry.paths()) == 1
    await library.close()


async def test_other_credentials_do_not_join(registry: FakeRegistry, library: ImageStore) -> None:
    registry.sign_in = "basic"
    registry.put_image("a", "1", [BASE])
    ref = f"{registry.address}/a:1"
    good = Auth(username=registry.username, password=registry.password)
    answers = await asyncio.gather(library.pull(ref, good), library.pull(ref), return_exceptions=True)
    assert isinstance(answers[1], Unauthorized)
    assert not isinstance(answers[0], BaseException)
    await library.close()


async def test_a_cancelled_caller_leaves_the_pull_to_the_others(
    registry: FakeRegistry, library: ImageStore
) -> None:
    registry.put_image("a", "1", [BASE])
    registry.fail("/manifests/1", Status(503, {"Retry-After": "1"}))
    ref = f"{registry.address}/a:1"
    first = asyncio.create_task(library.pull(ref))
    second = asyncio.create_task(library.pull(ref))
    while not registry.seen:
        await asyncio.sleep(0)
    first.cancel()
    image = await second
    assert first.cancelled() and library.list() == (image,)
    await library.close()


async def test_the_last_caller_cancels_the_pull(registry: FakeRegistry, tmp_path: Path) -> None:
    library = make_library(tmp_path, timing=msgspec.structs.replace(QUICK, stall_s=30.0))
    registry.put_image("a", "1", [TOP])
    registry.fail("/blobs/" + registry.layer_digests("a", "1")[0], StallAfter(1000))
    began = asyncio.Event()
    pull = asyncio.create_task(
        library.pull(
            f"{registry.address}/a:1", on_progress=lambda p: began.set() if p.step == "download" else None
        )
    )
    await began.wait()
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    await library.close()
    assert leftovers(library) == [] and library.list() == ()
    # and nothing stands in the way of the next
    next_library = make_library(tmp_path)
    assert (await next_library.pull(f"{registry.address}/a:1")).size > 0
    await next_library.close()


async def test_a_deadline(registry: FakeRegistry, tmp_path: Path) -> None:
    library = make_library(
        tmp_path, timing=msgspec.structs.replace(QUICK, answer_s=30.0, stall_s=30.0), pull_timeout_s=0.2
    )
    registry.fail("/manifests/1", Hang())
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, PullDeadline) and error.timeout_s == 0.2


# ------------------------------------------------------------------------------------ trouble


async def test_unknown_image(registry: FakeRegistry, library: ImageStore) -> None:
    error = await refused(library, f"{registry.address}/no/such:1")
    assert isinstance(error, ManifestNotFound)
    assert "MANIFEST_UNKNOWN" in str(error)
    assert len([p for p in registry.paths() if "manifests" in p]) == 1


async def test_nobody_listens(library: ImageStore) -> None:
    error = await refused(library, "127.0.0.1:9/a:1")
    assert str(error).startswith("RegistryUnavailable")


@pytest.mark.parametrize("fault", [Status(500), Status(503), Status(429), Truncate(10), Hang()])
async def test_a_passing_trouble_is_tried_again(
    registry: FakeRegistry, library: ImageStore, fault: object
) -> None:
    registry.put_image("a", "1", [BASE])
    registry.fail("/manifests/", fault)  # type: ignore[arg-type]
    registry.fail(registry.layer_digests("a", "1")[0], fault)  # type: ignore[arg-type]
    assert (await library.pull(f"{registry.address}/a:1")).size > 0
    await library.close()


@pytest.mark.parametrize("fault", [Status(500), Status(429), Truncate(10), Hang()])
async def test_a_lasting_trouble_is_an_error(
    registry: FakeRegistry, library: ImageStore, fault: object
) -> None:
    registry.put_image("a", "1", [BASE])
    registry.fail("/manifests/", fault, times=99)  # type: ignore[arg-type]
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, RegistryUnavailable)
    assert str(error).startswith("RegistryUnavailable")
    assert error.attempts == QUICK.attempts


async def test_retry_after_is_honoured(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [BASE])
    registry.fail("/manifests/", Status(429, {"Retry-After": "1"}))
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await library.pull(f"{registry.address}/a:1")
    assert loop.time() - begun >= 1.0
    await library.close()


async def test_retry_after_an_hour_is_not_waited_for(registry: FakeRegistry, library: ImageStore) -> None:
    registry.fail("/manifests/", Status(429, {"Retry-After": "3600"}), times=9)
    error = await refused(library, f"{registry.address}/a:1")
    assert "3600 s" in str(error)


@pytest.mark.parametrize("fault", [Truncate(150_000), StallAfter(150_000)])
@pytest.mark.parametrize("ranges", [True, False])
async def test_a_broken_download_goes_on(
    registry: FakeRegistry, library: ImageStore, fault: object, ranges: bool
) -> None:
    registry.ranges = ranges
    registry.put_image("a", "1", [TOP])
    digest = registry.layer_digests("a", "1")[0]
    registry.fail(digest, fault)  # type: ignore[arg-type]
    await library.pull(f"{registry.address}/a:1")
    asked = [seen.headers.get("range") for seen in registry.seen if seen.path.endswith(digest)]
    assert asked == [None, "bytes=150000-"]
    await library.close()


async def test_a_truncated_layer(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [TOP])
    digest = registry.layer_digests("a", "1")[0]
    registry.fail(digest, Truncate(0), times=99)
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, RegistryUnavailable)


async def test_a_layer_shorter_than_announced(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [TOP])
    digest = registry.layer_digests("a", "1")[0]
    registry.blobs[digest] = registry.blobs[digest][:-1]
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, (RegistryUnavailable, DigestMismatch))


async def test_a_layer_longer_than_announced(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [TOP])
    digest = registry.layer_digests("a", "1")[0]
    registry.blobs[digest] += b"more"
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, DigestMismatch) and "size" in error.what


@pytest.mark.parametrize("part", ["layer", "config", "manifest"])
async def test_wrong_bytes(registry: FakeRegistry, library: ImageStore, part: str) -> None:
    digest = registry.put_image("a", "1", [BASE])
    wanted = {
        "layer": registry.layer_digests("a", "1")[0],
        "config": registry.config_id("a", "1"),
        "manifest": f"/manifests/{digest}",
    }[part]
    registry.fail(wanted, Corrupt(), times=9)
    error = await refused(library, f"{registry.address}/a@{digest}")
    assert isinstance(error, DigestMismatch)


async def test_a_wrong_diff_id(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [BASE], diff_ids=["sha256:" + "0" * 64])
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, DigestMismatch) and "diff id" in error.what


async def test_a_hostile_layer(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [BASE, make_layer({"../../escape": b"x"})])
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, LayerRejected)
    # the good one below waits for the next collection
    await library.collect()
    assert library.layers.usage.inodes == 0


@pytest.mark.parametrize("cut", [5, 2000])
async def test_a_compressed_stream_that_ends_early(
    registry: FakeRegistry, library: ImageStore, cut: int
) -> None:
    registry.put_image("a", "1", [TOP])
    data, kind = registry.manifests["a", "1"]
    manifest = json.loads(data)
    short = registry.blobs[manifest["layers"][0]["digest"]][:cut]
    manifest["layers"][0] |= {"digest": registry.put_blob(short), "size": len(short)}
    registry.put_manifest("a", "1", manifest, kind)
    error = await refused(library, f"{registry.address}/a:1")
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
async def test_layers_of_other_kinds(registry: FakeRegistry, library: ImageStore, media_type: str) -> None:
    registry.put_image("a", "1", [BASE])
    data, kind = registry.manifests["a", "1"]
    manifest = json.loads(data)
    manifest["layers"][0]["mediaType"] = media_type
    registry.put_manifest("a", "1", manifest, kind)
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, UnsupportedMedia) and error.media_type == media_type


async def test_schema_1(registry: FakeRegistry, library: ImageStore) -> None:
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    registry.put_manifest("a", "1", {"schemaVersion": 1, "name": "a", "fsLayers": []}, kind)
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, UnsupportedMedia) and "schema 1" in str(error)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"<html>", b'{"schemaVersion": 2, "config": 5}', b"\xff"]
)
async def test_rubbish_instead_of_a_manifest(
    registry: FakeRegistry, library: ImageStore, content: bytes
) -> None:
    registry.put_manifest("a", "1", content, "application/vnd.oci.image.manifest.v1+json")
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, ManifestInvalid)


async def test_another_platform(registry: FakeRegistry, library: ImageStore) -> None:
    registry.put_image("a", "1", [BASE], architecture="s390x")
    error = await refused(library, f"{registry.address}/a:1")
    assert isinstance(error, ManifestNotFound) and "linux/s390x" in str(error)


async def test_a_full_disk(registry: FakeRegistry, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 600 << 10) as disk:
        library = make_library(disk)
        registry.put_image("a", "1", [make_layer({"big": bytes(2 << 20)})])
        error = await refused(library, f"{registry.address}/a:1")
        assert isinstance(error, DiskFull)
        registry.put_image("b", "1", [make_layer({"small": b"fits"})])
        assert (await library.pull(f"{registry.address}/b:1")).size > 0
        await library.close()


async def test_no_room_for_the_download(registry: FakeRegistry, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 100 << 10) as disk:
        library = make_library(disk)
        registry.put_image("a", "1", [TOP])
        error = await refused(library, f"{registry.address}/a:1")
        assert isinstance(error, DiskFull)


async def test_no_inode_left(registry: FakeRegistry, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20, inodes=30) as disk:
        library = make_library(disk)
        registry.put_image("a", "1", [make_layer({f"f{n}": b"" for n in range(40)})])
        error = await refused(library, f"{registry.address}/a:1")
        assert isinstance(error, DiskFull)


# ----------------------------------------------------------------------------------- sign-in


def credentials(registry: FakeRegistry, form: str, **more: str) -> Auth:
    pair = f"{registry.username}:{registry.password}".encode()
    fields = {
        "password": {"username": registry.username, "password": registry.password},
        "auth": {"auth": base64.b64encode(pair).decode()},
        "identity": {"identity_token": registry.identity_token},
        "registry": {"registry_token": registry.token},
        "none": {},
    }[form]
    return Auth(**fields, **more)


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("basic", "password"),
        ("basic", "auth"),
        ("bearer", "password"),
        ("bearer", "auth"),
        ("bearer", "identity"),
        ("bearer", "registry"),
    ],
)
async def test_signing_in(registry: FakeRegistry, library: ImageStore, scheme: str, form: str) -> None:
    registry.sign_in = scheme
    registry.put_image("a", "1", [BASE, TOP])
    image = await library.pull(f"{registry.address}/a:1", credentials(registry, form))
    assert image.size > 0
    # one token serves the whole pull
    assert registry.paths().count("/token") == (1 if scheme == "bearer" and form != "registry" else 0)
    await library.close()


@pytest.mark.parametrize("in_one_line", [False, True])
@pytest.mark.parametrize(
    "others", [("Negotiate",), ("Negotiate YII=", "NTLM", 'Digest realm="x", nonce="y"')]
)
async def test_pull_with_other_challenges_before_basic_succeeds(
    registry: FakeRegistry, library: ImageStore, others: tuple[str, ...], in_one_line: bool
) -> None:
    registry.sign_in = "basic"
    registry.challenges_before, registry.challenges_in_one_line = others, in_one_line
    registry.put_image("a", "1", [BASE])
    assert (await library.pull(f"{registry.address}/a:1", credentials(registry, "password"))).size > 0
    await library.close()


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
@pytest.mark.parametrize("form", ["none", "wrong"])
async def test_refused_access_says_nothing_secret(
    registry: FakeRegistry, library: ImageStore, scheme: str, form: str
) -> None:
    registry.sign_in = scheme
    auth = Auth() if form == "none" else Auth(username="eve", password="guessed-secret")
    error = await refused(library, f"{registry.address}/a:1", auth)
    assert isinstance(error, Unauthorized)
    shown = str(error) + repr(error.__cause__) + repr(auth)
    sent = base64.b64encode(b"eve:guessed-secret").decode()
    assert "secret" not in shown and sent not in shown


async def test_a_registry_token_that_is_refused(registry: FakeRegistry, library: ImageStore) -> None:
    registry.sign_in = "bearer"
    error = await refused(library, f"{registry.address}/a:1", Auth(registry_token="stale-secret"))
    assert isinstance(error, Unauthorized) and "stale-secret" not in str(error)


async def test_credentials_for_another_host_stay_here(registry: FakeRegistry, library: ImageStore) -> None:
    registry.sign_in = "basic"
    auth = credentials(registry, "password", server_address="https://other.example.com/v1/")
    assert isinstance(await refused(library, f"{registry.address}/a:1", auth), Unauthorized)
    assert not any("authorization" in seen.headers for seen in registry.seen)


async def test_credentials_named_for_this_host(registry: FakeRegistry, library: ImageStore) -> None:
    registry.sign_in = "basic"
    registry.put_image("a", "1", [BASE])
    auth = credentials(registry, "password", server_address=registry.address)
    assert (await library.pull(f"{registry.address}/a:1", auth)).size > 0
    await library.close()


async def test_a_redirect_takes_no_credentials_along(registry: FakeRegistry, library: ImageStore) -> None:
    registry.sign_in = "basic"
    registry.put_image("a", "1", [BASE])
    digest = registry.layer_digests("a", "1")[0]
    with FakeRegistry(blobs=registry.blobs).serving() as storage:
        url = f"http://{storage.address}/v2/x/blobs/{digest}?signature=abc"
        registry.fail(f"/v2/a/blobs/{digest}", Status(307, {"Location": url}))
        await library.pull(f"{registry.address}/a:1", credentials(registry, "password"))
        assert len(storage.seen) == 1
        assert "authorization" not in storage.seen[0].headers
    await library.close()


async def test_redirects_end(registry: FakeRegistry, library: ImageStore) -> None:
    registry.fail("/manifests/", Status(302, {"Location": "/v2/a/manifests/1"}), times=99)
    assert isinstance(await refused(library, f"{registry.address}/a:1"), RegistryUnavailable)


async def test_a_redirect_to_a_file(registry: FakeRegistry, library: ImageStore) -> None:
    registry.fail("/manifests/", Status(302, {"Location": "file:///etc/passwd"}), times=99)
    assert isinstance(await refused(library, f"{registry.address}/a:1"), RegistryUnavailable)


# ----------------------------------------------------------------------------------- mirrors


def write_hosts(root: Path, domain: str, text: str) -> Path:
    folder = root / "certs.d" / domain
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(text)
    return root / "certs.d"


async def test_a_mirror_is_asked_first(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.put_image("library/box", "1", [BASE])
    certs = write_hosts(
        tmp_path, "docker.io",
        f'server = "http://127.0.0.1:9"\n[host."http://{registry.address}"]\n'
        'capabilities = ["pull", "resolve"]\n'
        f'[host."http://{registry.address}".header]\nx-thing = ["one"]\n',
    )  # fmt: skip
    library = make_library(tmp_path, config_path=certs)
    image = await library.pull("box:1")
    assert image.repo_tags == ("docker.io/library/box:1",)
    assert registry.seen[0].query == {"ns": ["docker.io"]}
    assert registry.seen[0].headers["x-thing"] == "one"
    await library.close()


@pytest.mark.parametrize("trouble", [Status(404), Status(500), Status(401), Corrupt()])
async def test_the_registry_stands_in_for_its_mirror(
    registry: FakeRegistry, tmp_path: Path, trouble: object
) -> None:
    digest = registry.put_image("a", "1", [BASE])
    with FakeRegistry(blobs=registry.blobs, manifests=registry.manifests).serving() as mirror:
        mirror.fail("/", trouble, times=99)  # type: ignore[arg-type]
        certs = write_hosts(
            tmp_path, "some.example.com",
            f'server = "http://{registry.address}"\n[host."http://{mirror.address}"]\n',
        )  # fmt: skip
        library = make_library(tmp_path, config_path=certs)
        image = await library.pull(f"some.example.com/a@{digest}")
        assert image.size > 0 and mirror.seen
    await library.close()


async def test_capabilities_and_path(registry: FakeRegistry, tmp_path: Path) -> None:
    """A mirror that may only pull is not asked what a tag means."""
    registry.put_image("cache/a", "1", [BASE])
    registry.put_image("a", "1", [BASE])
    with FakeRegistry(blobs=registry.blobs, manifests=registry.manifests).serving() as mirror:
        certs = write_hosts(
            tmp_path, "_default",
            f'server = "http://{registry.address}"\n[host."http://{mirror.address}/v2/cache"]\n'
            'capabilities = ["pull"]\noverride_path = true\n',
        )  # fmt: skip
        library = make_library(tmp_path, config_path=certs)
        await library.pull("some.example.com/a:1")
        assert "/v2/a/manifests/1" in registry.paths()
        assert mirror.paths() and all(path.startswith("/v2/cache/a/blobs/") for path in mirror.paths())
    await library.close()


async def test_no_secret_reaches_a_mirror_that_it_is_not_for(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.sign_in = "basic"
    certs = write_hosts(tmp_path, "some.example.com", f'server = "http://{registry.address}"\n')
    library = make_library(tmp_path, config_path=certs)
    auth = credentials(registry, "password", server_address="some.example.com")
    registry.put_image("a", "1", [BASE])
    assert (await library.pull("some.example.com/a:1", auth)).size > 0
    await library.close()
    with FakeRegistry(sign_in="basic").serving() as mirror:
        file = certs / "some.example.com" / "hosts.toml"
        file.write_text(f'server = "http://{registry.address}"\n[host."http://{mirror.address}"]\n')
        await library.pull("some.example.com/a:1", auth)
        assert mirror.seen and not any("authorization" in seen.headers for seen in mirror.seen)
    await library.close()


# --------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture
def secure(certificate: Path) -> Iterator[FakeRegistry]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "ca.pem", certificate / "key.pem")
    with FakeRegistry(tls=context).serving() as serving:
        yield serving


@pytest.mark.parametrize("setting", ['ca = "{ca}"', "skip_verify = true"])
async def test_https(secure: FakeRegistry, certificate: Path, tmp_path: Path, setting: str) -> None:
    secure.put_image("a", "1", [BASE])
    text = f'server = "https://{secure.address}"\n{setting.format(ca=certificate / "ca.pem")}\n'
    certs = write_hosts(tmp_path, secure.address.replace(":", "_") + "_", text)
    library = make_library(tmp_path, config_path=certs)
    assert (await library.pull(f"{secure.address}/a:1")).size > 0
    await library.close()


async def test_an_unknown_authority(secure: FakeRegistry, tmp_path: Path) -> None:
    certs = write_hosts(tmp_path, "some.example.com", f'server = "https://{secure.address}"\n')
    error = await refused(make_library(tmp_path, config_path=certs), "some.example.com/a:1")
    assert isinstance(error, RegistryUnavailable)
    assert "CERTIFICATE_VERIFY_FAILED" in str(error) and error.attempts == 1
