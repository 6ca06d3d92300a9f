"""Image references, valid and invalid."""

from __future__ import annotations

import pytest

from image.errors import InvalidReference
from image.reference import parse

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("user/app", "docker.io/user/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:v1", "localhost:5000/app:v1"),
        ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("registry.example.com/app__x/y-z.q:T_1.2-3", "registry.example.com/app__x/y-z.q:T_1.2-3"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"registry.example.com:443/a:1@{DIGEST}", f"registry.example.com:443/a@{DIGEST}"),
        ("HOST/app", "HOST/app:latest"),
    ],
)
def test_reference_is_normalized(text: str, full: str) -> None:
    reference = parse(text)
    assert str(reference) == full
    assert parse(full) == parse(str(parse(full)))


def test_reference_has_domain_path_tag_and_digest() -> None:
    reference = parse(f"localhost:5000/a/b:1@{DIGEST}")
    assert (reference.domain, reference.path, reference.tag) == ("localhost:5000", "a/b", "1")
    assert reference.name == "localhost:5000/a/b"
    assert reference.target == reference.digest == DIGEST
    assert reference.tagged == "localhost:5000/a/b:1"


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "@", "a:", ":tag", "a@", "a@sha256:short", f"a@md5:{'a' * 32}", "A", "a/B",
        "a//b", "/a", "a/",
        "a b", "a\n", "a:b:c", "-a", "a-", "a..b", "a___b", "a:-x", "a:" + "t" * 129, "a" * 64, 
        "x/" * 130 + "y",
        "http://host/a", "ho_st.com/a", "host.com:99999999/a", "a@" + DIGEST.upper(), "../a", "a/../b", "é",
        f"a@{DIGEST}@{DIGEST}",
    ],
)  # fmt: skip
def test_invalid_reference_is_rejected(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse(text)
