"""Manifests, indexes and configurations, and which entry of an index runs on this host."""

from __future__ import annotations

import json

import pytest

from image import manifest, platforms
from image.errors import DigestMismatch, ManifestInvalid, UnsupportedMedia
from image.manifest import Descriptor, ImageIndex, Manifest, Platform

AMD64 = Platform(os="linux", architecture="amd64")
D = "sha256:" + "1" * 64


def entry(name: str, architecture: str, variant: str = "", os: str = "linux") -> Descriptor:
    platform = Platform(os=os, architecture=architecture, variant=variant)
    digest = "sha256:" + name.encode().hex().ljust(64, "0")
    return Descriptor(media_type=manifest.OCI_MANIFEST, digest=digest, size=1, platform=platform)


def choose(machine: str, *entries: Descriptor) -> Descriptor | None:
    index = ImageIndex(schema_version=2, manifests=list(entries))
    return next(iter(platforms.candidates(index, platforms.host_platform(machine))), None)


def test_index_entry_of_the_platform_is_chosen() -> None:
    arm, amd, windows = entry("a", "arm64"), entry("b", "amd64"), entry("c", "amd64", os="windows")
    assert choose("x86_64", windows, arm, amd) == amd
    assert choose("aarch64", windows, arm, amd) == arm
    assert choose("s390x", windows, arm, amd) is None


def test_amd64_variant_above_baseline_is_not_chosen() -> None:
    plain, third = entry("a", "amd64"), entry("b", "amd64", "v3")
    assert choose("x86_64", third, plain) == plain
    assert choose("x86_64", third) is None


def test_highest_arm_variant_up_to_the_hosts_is_chosen() -> None:
    v6, v7, v8 = entry("a", "arm", "v6"), entry("b", "arm", "v7"), entry("c", "arm", "v8")
    assert choose("armv7l", v6, v7, v8) == v7
    assert choose("armv7l", v6, v8) == v6
    assert choose("aarch64", entry("d", "arm64", "v8")) is not None


def test_first_of_equal_index_entries_is_chosen() -> None:
    first, second = entry("a", "amd64"), entry("b", "amd64")
    assert choose("x86_64", first, second) == first


def test_index_entry_without_platform_is_chosen_last() -> None:
    bare = Descriptor(media_type=manifest.OCI_MANIFEST, digest=D, size=1)
    attestation = entry("x", "unknown", os="unknown")
    assert choose("x86_64", bare, attestation, entry("a", "amd64")) == entry("a", "amd64")
    assert choose("x86_64", attestation, bare) == bare
    other = Descriptor(media_type="application/vnd.something+json", digest=D, size=1)
    assert choose("x86_64", other) is None


def test_chain_ids_equal_those_of_the_specification() -> None:
    first, second = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    chain = manifest.chain_ids([first, second])
    assert chain == (first, manifest.digest_of(f"{first} {second}".encode()))
    assert manifest.chain_ids([]) == ()


def document(**changes: object) -> bytes:
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": D, "size": 1}
    value = {
        "schemaVersion": 2,
        "mediaType": manifest.OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": D, "size": 1},
        "layers": [layer],
    }
    return json.dumps(value | changes).encode()


def test_document_without_media_type_is_recognized() -> None:
    assert isinstance(manifest.decode("x", document(mediaType="")), Manifest)
    index = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    assert isinstance(manifest.decode("x", index), ImageIndex)


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"[",
        b"\xff\xfe",
        b"[" * 100_000,
        document(config=None),
        document(layers=[None]),
        document(layers=[{"digest": "sha256:../../x", "size": 1, "mediaType": "x"}]),
        document(layers=[{"digest": D, "size": -1}]),
        document(config={"mediaType": "application/vnd.oci.image.config.v1+json", "digest": "x", "size": 1}),
        document(layers=[json.loads(document())["layers"][0]] * 501),
    ],
)
def test_invalid_manifest_is_rejected(data: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        manifest.decode("x", data)


def test_null_lists_and_fields_of_a_manifest_mean_absent() -> None:
    found = manifest.decode("x", document(layers=None, annotations=None, artifactType=None))
    assert isinstance(found, Manifest) and found.layers == []
    index = json.dumps({"schemaVersion": 2, "mediaType": manifest.OCI_INDEX, "manifests": None}).encode()
    assert manifest.decode("x", index) == ImageIndex(
        schema_version=2, media_type=manifest.OCI_INDEX, manifests=[]
    )
    entry = {"digest": D, "size": 1, "platform": {"os": "linux", "architecture": "amd64", "variant": None}}
    index = json.dumps({"schemaVersion": 2, "mediaType": None, "manifests": [entry]}).encode()
    decoded = manifest.decode("x", index)
    assert isinstance(decoded, ImageIndex) and decoded.manifests[0].platform == AMD64


@pytest.mark.parametrize(
    "names",
    [("linux", "x86_64"), ("Linux", "AMD64"), ("linux", "X86-64"), ("linux", "amd64")],
)
def test_platform_aliases_are_normalized(names: tuple[str, str]) -> None:
    platform = Platform(os=names[0], architecture=names[1])
    assert platforms.normalize(platform) == AMD64
    assert choose("x86_64", entry("a", names[1], os=names[0])) is not None


@pytest.mark.parametrize(
    ("architecture", "variant", "expected"),
    [
        ("aarch64", "", ("arm64", "")), ("arm64", "8", ("arm64", "v8")), ("armhf", "", ("arm", "v7")),
        ("armel", "", ("arm", "v6")), ("i386", "", ("386", "")), ("ARM", "V7", ("arm", "v7")),
        ("riscv64", "", ("riscv64", "")),
    ],
)  # fmt: skip
def test_architecture_aliases_are_normalized(
    architecture: str, variant: str, expected: tuple[str, str]
) -> None:
    found = platforms.normalize(Platform(os="linux", architecture=architecture, variant=variant))
    assert (found.architecture, found.variant) == expected


def test_user_longer_than_the_limit_is_rejected() -> None:
    found = manifest.decode("x", document())
    assert isinstance(found, Manifest)
    for user, accepted in (("1" * 1024, True), ("1" * 5000, False)):
        config = json.dumps({"config": {"User": user}, "rootfs": {"diff_ids": [D]}}).encode()
        if accepted:
            assert manifest.decode_config("x", config, found).config is not None
            continue
        with pytest.raises(ManifestInvalid, match="User: user characters: 5000 is above the limit of 1024"):
            manifest.decode_config("x", config, found)


def test_artifact_is_rejected_with_its_media_type() -> None:
    config = {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": D, "size": 1}
    with pytest.raises(UnsupportedMedia, match=r"helm\.config"):
        manifest.decode("x", document(config=config))


@pytest.mark.parametrize("diff_ids", [[], [D, D], ["sha512:" + "a" * 128], ["../x"]])
def test_configuration_with_wrong_diff_ids_is_rejected(diff_ids: list[str]) -> None:
    found = manifest.decode("x", document())
    assert isinstance(found, Manifest)
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
    with pytest.raises(ManifestInvalid):
        manifest.decode_config("x", config, found)


def test_null_in_a_configuration_means_absent() -> None:
    found = manifest.decode("x", document())
    assert isinstance(found, Manifest)
    value = {
        "config": {"Cmd": None, "Env": None, "Volumes": {"/data": None}, "Labels": None, "User": None},
        "created": None,
        "history": None,
        "os": None,
        "variant": None,
        "rootfs": {"type": None, "diff_ids": [D]},
    }
    config = manifest.decode_config("x", json.dumps(value).encode(), found)
    assert config.config is not None and config.config.cmd is None
    assert set(config.config.volumes or ()) == {"/data"}


def test_check_rejects_wrong_size_and_digest() -> None:
    digest = manifest.digest_of(b"data")
    manifest.check("x", b"data", digest, 4)
    manifest.check("x", b"data", manifest.digest_of(b"data", "sha512:"))
    with pytest.raises(DigestMismatch, match="size"):
        manifest.check("x", b"data", digest, 5)
    with pytest.raises(DigestMismatch):
        manifest.check("x", b"Data", digest)
