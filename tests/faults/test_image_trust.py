"""Trust policies: signatures in cosign's two forms, external verifiers, and what is pulled then."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from image.errors import ImageRefused, RegistryUnavailable
from image.reference import parse
from image.trust import Policy, Trust, verifier
from image.trust.cosign import BUNDLE, COUNT_LIMIT, SIGNATURE, SIGNED, SIMPLE, STATEMENT
from tests.fakes.registry import OCI, FakeRegistry, Status
from tests.kit.pulls import BASE, TOP, open_store, pull_error

Private = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def write_key(folder: Path, key: Private, name: str = "cosign.pub") -> str:
    file = folder / name
    file.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return str(file)


def sign(key: Private, message: bytes) -> str:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return base64.b64encode(key.sign(message, ec.ECDSA(hashes.SHA256()))).decode()
    if isinstance(key, rsa.RSAPrivateKey):
        return base64.b64encode(key.sign(message, padding.PKCS1v15(), hashes.SHA256())).decode()
    return base64.b64encode(key.sign(message)).decode()


def put_simple(
    registry: FakeRegistry, key: Private, image: str, *, says: str = "", of: str = "", signature: str = ""
) -> None:
    """Sign `image`, a digest, as cosign 2 does; the document may say another digest or repository."""
    repository = of or f"{registry.address}/app"
    critical = {
        "identity": {"docker-reference": repository},
        "image": {"docker-manifest-digest": says or image},
        "type": "cosign container image signature",
    }
    payload = json.dumps({"critical": critical, "optional": None}).encode()
    layer = {
        "mediaType": SIMPLE,
        "digest": registry.put_blob(payload),
        "size": len(payload),
        "annotations": {SIGNATURE: signature or sign(key, payload)},
    }
    config = {"mediaType": f"{OCI}.config.v1+json", "digest": registry.put_blob(b"{}"), "size": 2}
    document = {"schemaVersion": 2, "config": config, "layers": [layer]}
    registry.put_manifest("app", f"{image.replace(':', '-')}.sig", document, f"{OCI}.manifest.v1+json")


def put_bundle(registry: FakeRegistry, key: Private, image: str, *, predicate: str = SIGNED) -> None:
    """Sign `image`, a digest, as cosign 3 does, listed by the tag of a registry without referrers."""
    kind, _, digits = image.partition(":")
    subject = {"digest": {kind: digits}}
    statement = {"_type": "https://in-toto.io/Statement/v1", "subject": [subject], "predicateType": predicate}
    payload = json.dumps(statement).encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(STATEMENT), STATEMENT.encode(), len(payload), payload)
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": STATEMENT,
        "signatures": [{"sig": sign(key, signed), "keyid": ""}],
    }
    media_type = f"{BUNDLE}.v0.3+json"
    blob = json.dumps(
        {"mediaType": media_type, "verificationMaterial": {}, "dsseEnvelope": envelope}
    ).encode()
    layer = {"mediaType": media_type, "digest": registry.put_blob(blob), "size": len(blob)}
    artifact = {"schemaVersion": 2, "artifactType": media_type, "layers": [layer]}
    digest = registry.put_manifest("app", "", artifact, f"{OCI}.manifest.v1+json")
    entry = {"mediaType": f"{OCI}.manifest.v1+json", "digest": digest, "artifactType": media_type, "size": 1}
    registry.put_manifest(
        "app", image.replace(":", "-"), {"schemaVersion": 2, "manifests": [entry]}, f"{OCI}.index.v1+json"
    )


def of_key(*files: str, match: str = "digest") -> Mapping[str, Policy]:
    return {"*": Policy(policy="key", keys=files, match=match)}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa", "ed25519"])
@pytest.mark.parametrize("form", [put_simple, put_bundle])
async def test_image_with_a_signature_by_the_key_is_pulled(
    registry: FakeRegistry, tmp_path: Path, kind: str, form: Callable[[FakeRegistry, Private, str], None]
) -> None:
    make: Mapping[str, Callable[[], Private]] = {
        "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }
    key = make[kind]()
    form(registry, key, registry.put_image("app", "1", [BASE, TOP]))
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key)))
    image = await store.pull(f"{registry.address}/app:1")
    await store.close()
    assert image.id == registry.config_id("app", "1")


async def test_signature_of_an_index_covers_its_image(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    one = registry.put_image("app", "", [BASE])
    index = registry.put_index("app", "1", [(one, {"os": "linux", "architecture": "amd64"})])
    put_simple(registry, key, index)
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key)))
    assert (await store.pull(f"{registry.address}/app:1")).repo_digests == (
        f"{registry.address}/app@{index}",
    )
    with pytest.raises(ImageRefused):  # which by itself is not signed
        await store.pull(f"{registry.address}/app@{one}")
    await store.close()


async def test_tag_that_moves_after_the_check_gives_what_was_checked(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    put_simple(registry, key, registry.put_image("app", "1", [BASE]))
    checked = registry.config_id("app", "1")
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key)))
    check = store.puller._trust.check

    async def check_and_move(*arguments: object) -> None:
        await check(*arguments)  # type: ignore[arg-type]
        registry.put_image("app", "1", [TOP])

    store.puller._trust.check = check_and_move  # type: ignore[method-assign,assignment]
    assert (await store.pull(f"{registry.address}/app:1")).id == checked
    await store.close()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("none", "it has no signature"),
        ("other key", "by none of the configured keys"),
        ("other digest", "a signature is of sha256:"),
        ("tampered", "by none of the configured keys"),
        ("not base64", "cannot be read"),
        ("no json", "cannot be read"),
        ("another predicate", "cannot be read"),
    ],
)
async def test_image_without_a_good_signature_is_refused(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey, fault: str, expected: str
) -> None:
    image = registry.put_image("app", "1", [BASE])
    other = ec.generate_private_key(ec.SECP256R1())
    if fault == "other key":
        put_simple(registry, other, image)
    elif fault == "other digest":
        put_simple(registry, key, image, says=f"sha256:{'0' * 64}")
    elif fault == "tampered":
        put_simple(registry, key, image, signature=sign(key, b"something else"))
    elif fault == "not base64":
        put_simple(registry, key, image, signature="%%%")
    elif fault == "no json":
        registry.put_manifest("app", f"{image.replace(':', '-')}.sig", b"[" * 5000, f"{OCI}.manifest.v1+json")
    elif fault == "another predicate":
        put_bundle(registry, key, image, predicate="https://slsa.dev/provenance/v1")
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key)))
    error = await pull_error(store, f"{registry.address}/app:1")
    assert isinstance(error, ImageRefused)
    # the kubelet compares this beginning with its ErrSignatureValidationFailed
    assert str(error).startswith(f"SignatureValidationFailed: {registry.address}/app:1 ({image}): ")
    assert expected in str(error)
    assert not [path for path in registry.paths() if path.endswith(registry.layer_digests("app", "1")[0])]


D = "sha256:" + "0" * 64


def simple(**fields: object) -> dict[str, object]:
    """Return a signature's layer, with other fields."""
    return {"mediaType": SIMPLE, "digest": D, "size": 2, "annotations": {SIGNATURE: "AAAA"}} | fields


ODD_SIGNATURES: dict[str, object] = {
    "null": {"layers": None},
    "text": {"layers": "x"},
    "empty": {},
    "list": [],
    "unknown algorithm": {"layers": [simple(digest="md9:00")]},
    "weak algorithm": {"layers": [simple(digest="md5:" + "0" * 32)]},
    "digest that is a path": {"layers": [simple(digest="../../x")]},
    "digest without a size": {"layers": [{"mediaType": SIMPLE, "digest": D}]},
    "negative size": {"layers": [simple(size=-1)]},
    "size above the limit": {"layers": [simple(size=1 << 40)]},
    "size beyond integers": {"layers": [simple(size=1 << 70)]},
    "no annotations": {"layers": [simple(annotations=None)]},
    "annotation of another type": {"layers": [simple(annotations={SIGNATURE: 1})]},
    "signature of a megabyte": {"layers": [simple(annotations={SIGNATURE: "A" * 1_000_000})]},
    "blob that is missing": {"layers": [simple()]},
    "2,000 layers": {"layers": [simple()] * 2000},
}


@pytest.mark.parametrize("kind", ODD_SIGNATURES)
async def test_image_whose_signatures_are_odd_is_refused(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey, kind: str
) -> None:
    image = registry.put_image("app", "1", [BASE])
    data = json.dumps(ODD_SIGNATURES[kind]).encode()
    registry.put_manifest("app", f"{image.replace(':', '-')}.sig", data, f"{OCI}.manifest.v1+json")
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key)))
    error = await pull_error(store, f"{registry.address}/app:1")
    assert isinstance(error, ImageRefused) and len(str(error)) < 1000
    assert sum("/blobs/" in path for path in registry.paths()) <= COUNT_LIMIT


BUNDLED = {"mediaType": f"{BUNDLE}.v0.3+json", "digest": D, "size": 2}
ODD_REFERRERS: dict[str, tuple[object, object]] = {
    "null": ({"manifests": None}, {}),
    "number": ({"manifests": 1}, {}),
    "digest that is a tag": ({"manifests": [{"digest": "1", "artifactType": BUNDLE}]}, {}),
    "digest that is a path": ({"manifests": [{"digest": "../x", "artifactType": BUNDLE}]}, {}),
    "type of another type": ({"manifests": [{"digest": D, "artifactType": 1}]}, {}),
    "missing bundle": ({"manifests": [{"digest": D, "artifactType": BUNDLE}]}, {}),
    "many": ({"manifests": [{"digest": D, "artifactType": BUNDLE}] * 2000}, {}),
    "no layers": ({"manifests": [{"digest": "BUNDLE"}]}, {"layers": None}),
    "two layers": ({"manifests": [{"digest": "BUNDLE"}]}, {"layers": [BUNDLED, BUNDLED]}),
    "unknown algorithm": ({"manifests": [{"digest": "BUNDLE"}]}, {"layers": [BUNDLED | {"digest": "md9:0"}]}),
    "negative size": ({"manifests": [{"digest": "BUNDLE"}]}, {"layers": [BUNDLED | {"size": -1}]}),
}


@pytest.mark.parametrize("kind", ODD_REFERRERS)
async def test_image_whose_bundles_are_odd_is_refused(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey, kind: str
) -> None:
    image = registry.put_image("app", "1", [BASE])
    referrers, artifact = ODD_REFERRERS[kind]
    bundle = registry.put_manifest("app", "", json.dumps(artifact).encode(), f"{OCI}.manifest.v1+json")
    data = json.dumps(referrers).replace("BUNDLE", bundle).encode()
    registry.put_manifest("app", image.replace(":", "-"), data, f"{OCI}.index.v1+json")
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key)))
    error = await pull_error(store, f"{registry.address}/app:1")
    assert isinstance(error, ImageRefused) and len(str(error)) < 1000
    assert len(registry.paths()) < 2 * COUNT_LIMIT


ODD_BUNDLES: dict[str, object] = {
    "null": None,
    "no envelope": {"dsseEnvelope": None},
    "no signatures": {"dsseEnvelope": {"payload": "e30=", "payloadType": STATEMENT, "signatures": []}},
    "null signatures": {"dsseEnvelope": {"payload": "e30=", "payloadType": STATEMENT, "signatures": None}},
    "not base64": {"dsseEnvelope": {"payload": "%", "payloadType": STATEMENT, "signatures": []}},
    "long type": {"dsseEnvelope": {"payload": "e30=", "payloadType": "x" * 500_000, "signatures": []}},
    "deep": [[[[]]]],
}


@pytest.mark.parametrize("kind", ODD_BUNDLES)
async def test_image_whose_bundle_holds_odd_values_is_refused(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey, kind: str
) -> None:
    image = registry.put_image("app", "1", [BASE])
    blob = json.dumps(ODD_BUNDLES[kind]).encode()
    layer = BUNDLED | {"digest": registry.put_blob(blob), "size": len(blob)}
    bundle = registry.put_manifest("app", "", {"layers": [layer]}, f"{OCI}.manifest.v1+json")
    index = {"manifests": [{"digest": bundle, "artifactType": BUNDLE}]}
    registry.put_manifest("app", image.replace(":", "-"), index, f"{OCI}.index.v1+json")
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key)))
    error = await pull_error(store, f"{registry.address}/app:1")
    assert isinstance(error, ImageRefused) and len(str(error)) < 1000


async def test_one_good_signature_among_bad_ones_is_enough(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    image = registry.put_image("app", "1", [BASE])
    put_simple(registry, ec.generate_private_key(ec.SECP256R1()), image)
    put_bundle(registry, key, image)
    unused = write_key(tmp_path, ed25519.Ed25519PrivateKey.generate(), "unused.pub")
    store = open_store(tmp_path, trust=of_key(unused, write_key(tmp_path, key)))
    await store.pull(f"{registry.address}/app:1")
    await store.close()


@pytest.mark.parametrize(("names", "pulled"), [("own", True), ("other.test/app", False)])
async def test_signature_for_another_repository_is_refused_where_that_must_match(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey, names: str, pulled: bool
) -> None:
    put_simple(registry, key, registry.put_image("app", "1", [BASE]), of="" if names == "own" else names)
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key), match="repository"))
    if pulled:
        await store.pull(f"{registry.address}/app:1")
        await store.close()
    else:
        error = await pull_error(store, f"{registry.address}/app:1")
        assert "names the repository 'other.test/app'" in str(error)


async def test_bundle_which_names_no_repository_is_refused_where_that_must_match(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    put_bundle(registry, key, registry.put_image("app", "1", [BASE]))
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key), match="repository"))
    assert "names the repository 'nothing'" in str(await pull_error(store, f"{registry.address}/app:1"))


async def test_registry_that_cannot_list_signatures_now_is_unavailable_not_unsigned(
    registry: FakeRegistry, tmp_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    registry.put_image("app", "1", [BASE])
    registry.fail(".sig", Status(503), times=9)
    store = open_store(tmp_path, trust=of_key(write_key(tmp_path, key)))
    assert isinstance(await pull_error(store, f"{registry.address}/app:1"), RegistryUnavailable)


async def test_key_that_vanished_refuses_the_image(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.put_image("app", "1", [BASE])
    store = open_store(tmp_path, trust=of_key(str(tmp_path / "gone.pub")))
    assert "gone.pub: No such file" in str(await pull_error(store, f"{registry.address}/app:1"))


# -------------------------------------------------------------------------------- policies


def test_policy_of_the_longest_prefix_is_used() -> None:
    refuse, key = Policy(policy="refuse"), Policy(policy="key", keys=("/k",))
    trust = Trust({"*": refuse, "a.test": key, "a.test/team": Policy(), "docker.io/library": key})
    expected = {
        "b.test/x": "refuse",
        "a.test/x": "key",
        "a.test/teammate/x": "key",  # a prefix ends at a slash
        "a.test/team/x:1": "none",
        "a.test/team": "none",
        "busybox": "key",
        "someone/busybox": "refuse",
    }
    assert {name: trust.find(parse(name)).policy for name in expected} == expected
    assert Trust({"a.test": refuse}).find(parse("b.test/x")).policy == "none"


async def test_refused_prefix_is_not_pulled(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.put_image("app", "1", [BASE])
    store = open_store(tmp_path, trust={"*": Policy(policy="refuse")})
    assert isinstance(await pull_error(store, f"{registry.address}/app:1"), ImageRefused)


# --------------------------------------------------------------------------------- programs


def write_verifier(folder: Path, script: str) -> Mapping[str, Policy]:
    program = folder / "verifier"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"*": Policy(policy="verifier", verifier=str(program))}


async def test_verifier_gets_containerds_arguments_and_accepts(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    image = registry.put_image("app", "1", [BASE])
    seen = tmp_path / "seen"
    policies = write_verifier(tmp_path, f'printf "%s\\n" "$@" >{seen}; cat >>{seen}')
    store = open_store(tmp_path, trust=policies)
    await store.pull(f"{registry.address}/app:1")
    await store.close()
    *arguments, described = seen.read_text().splitlines()
    media_type = "application/vnd.oci.descriptor.v1+json"
    name = f"{registry.address}/app:1"
    assert arguments == ["-name", name, "-digest", image, "-stdin-media-type", media_type]
    size = len(registry.manifests["app", "1"][0])
    assert json.loads(described) == {"mediaType": f"{OCI}.manifest.v1+json", "digest": image, "size": size}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo not on the list; echo noise >&2; exit 1", "status 1: not on the list"),
        ("echo broken >&2; exit 7", "status 7: broken"),
        ("kill -9 $$", "status -9"),
        ("exec sleep 60", "did not decide within"),
        ("head -c 100000 /dev/zero; exit 1", "status 1"),
    ],
)
async def test_verifier_that_does_not_accept_refuses_the_image(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    monkeypatch.setattr(verifier, "TIMEOUT_S", 5.0 if "sleep" not in script else 0.2)
    registry.put_image("app", "1", [BASE])
    error = await pull_error(
        open_store(tmp_path, trust=write_verifier(tmp_path, script)), f"{registry.address}/app:1"
    )
    assert isinstance(error, ImageRefused)
    assert expected in str(error)


async def test_verifier_that_vanished_refuses_the_image(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.put_image("app", "1", [BASE])
    policies = write_verifier(tmp_path, "exit 0")
    os.unlink(policies["*"].verifier)  # noqa: PTH108
    error = await pull_error(open_store(tmp_path, trust=policies), f"{registry.address}/app:1")
    assert "cannot be run: No such file" in str(error)
