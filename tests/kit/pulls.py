"""Pulls from the registry double: a store with short timeouts, and what a failed pull must leave."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import msgspec
import pytest

from image.auth import Auth
from image.errors import ImageError
from image.image_store import ImageStore
from image.options import ImageOptions
from image.registry import Timing
from tests.fakes.registry import FakeRegistry, make_layer

QUICK = Timing(connect_s=2, stall_s=0.3, answer_s=1, attempts=3, backoff_s=0.01, backoff_limit_s=2)
BASE = make_layer({"etc": None, "etc/os": b"test", "bin": None, "bin/sh": b"#!" * 4000})
TOP = make_layer({"etc/.wh.os": b"", "app": os.urandom(200_000)})


def open_store(root: Path, **changes: object) -> ImageStore:
    """Load a store beneath `root`, with QUICK timing and these changes of its options."""
    store = ImageStore(root / "state", msgspec.structs.replace(ImageOptions(timing=QUICK), **changes))
    store.load()
    return store


def leftovers(store: ImageStore) -> list[str]:
    """Return the paths that are neither a layer nor an index entry."""
    root = Path(store.fs_usage().mountpoint)
    return [str(path) for name in ("staging", "trash") for path in (root / name).iterdir()]


async def pull_error(store: ImageStore, ref: str, auth: Auth | None = None) -> ImageError:
    """Pull, close the store, and return the error; the pull must fail and leave nothing."""
    with pytest.raises(ImageError) as caught:
        await store.pull(ref, auth)
    await store.close()
    assert leftovers(store) == []
    assert store.list() == ()
    return caught.value


def credentials(registry: FakeRegistry, form: str, **more: str) -> Auth:
    """Return the double's credential in one of the AuthConfig's forms."""
    pair = f"{registry.username}:{registry.password}".encode()
    fields = {
        "password": {"username": registry.username, "password": registry.password},
        "auth": {"auth": base64.b64encode(pair).decode()},
        "identity": {"identity_token": registry.identity_token},
        "registry": {"registry_token": registry.token},
        "none": {},
    }[form]
    return Auth(**fields, **more)


def write_hosts(root: Path, domain: str, text: str) -> Path:
    """Write a hosts.toml for this registry; returns the directory for `config_path`."""
    folder = root / "certs.d" / domain
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(text)
    return root / "certs.d"
