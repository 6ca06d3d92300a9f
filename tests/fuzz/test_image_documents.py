"""Documents of any content: parsers of images end with a value or with their own errors.

`corpus/KIND` has a file for each input that is worth keeping: every test begins with them, and varies them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image import manifest
from image.budget import Limits, OverLimit
from image.errors import ImageError
from image.hosts import find_hosts
from image.manifest import Descriptor, Manifest
from image.reference import parse
from image.registry.challenge import parse_challenges

CORPUS = Path(__file__).parent / "corpus"
LIMITS = Limits(json_values=500, json_depth=20, challenges=8)
IMAGE = Manifest(schema_version=2, config=Descriptor(digest="sha256:" + "0" * 64, size=1))


def read_hosts(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="husk-image-fuzz-") as folder:
        (Path(folder) / "a.example.com").mkdir()
        (Path(folder) / "a.example.com" / "hosts.toml").write_bytes(data)
        assert find_hosts(Path(folder), "a.example.com", LIMITS)


def read_reference(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    found = parse(text)
    assert parse(str(found)) in (found, parse(found.digested or found.tagged))


PARSERS: dict[str, Callable[[bytes], object]] = {
    "manifest": lambda data: manifest.decode("x", data, limits=LIMITS),
    "config": lambda data: manifest.decode_config("x", data, IMAGE, LIMITS),
    "hosts": read_hosts,
    "challenge": lambda data: parse_challenges(data.decode("latin-1").splitlines(), LIMITS),
    "reference": read_reference,
}


def kept(kind: str) -> list[bytes]:
    """Return the corpus of a kind."""
    return [path.read_bytes() for path in sorted((CORPUS / kind).iterdir())]


def try_parse(kind: str, data: bytes) -> None:
    """Parse; any error that is not the parser's own one fails the test."""
    try:
        PARSERS[kind](data)
    except (ImageError, OverLimit) as error:
        assert len(str(error)) < 3000


@pytest.mark.parametrize("kind", PARSERS)
def test_kept_inputs_are_parsed_or_refused(kind: str) -> None:
    assert kept(kind)
    for data in kept(kind):
        try_parse(kind, data)


@pytest.mark.parametrize("kind", PARSERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_inputs_are_parsed_or_refused(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(kept(kind))))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(damaged)))
        tokens = st.sampled_from(
            [b"[", b"{", b'"', b"\\", b"null", b"-1", b"1e999", b"\xff", b"]" * 3, b"\n"]
        )
        new = data.draw(st.one_of(tokens, st.binary(max_size=8)))
        damaged[at : at + data.draw(st.integers(0, 8))] = new
    try_parse(kind, bytes(damaged))


@pytest.mark.parametrize("kind", PARSERS)
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=400))
def test_arbitrary_inputs_are_parsed_or_refused(kind: str, data: bytes) -> None:
    try_parse(kind, data)
