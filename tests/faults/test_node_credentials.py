"""Credentials of the node: docker's config.json and its helpers, against a registry that asks for them."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from image.auth import Auth
from image.errors import Unauthorized
from image.hosts import Host
from image.node_credentials import NodeCredentials
from image.reference import parse
from tests.fakes.registry import FakeRegistry
from tests.kit.pulls import BASE, open_store, pull_error, write_hosts

PAIR = base64.b64encode(b"user:hunter2-secret").decode()


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry(sign_in="basic").serving() as serving:
        serving.put_image("team/app", "1", [BASE])
        yield serving


def write(folder: Path, content: Mapping[str, object] | str) -> Path:
    file = folder / "auth.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def write_helper(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str = "test") -> None:
    program = folder / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


async def pulls(registry: FakeRegistry, folder: Path, content: Mapping[str, object] | str) -> bool:
    """Return whether the image can be pulled with this file."""
    store = open_store(folder, auth_file=write(folder, content))
    try:
        await store.pull(f"{registry.address}/team/app:1")
        return True
    except Unauthorized:
        return False
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("HOST", True),
        ("http://HOST/v1/", True),
        ("https://HOST", True),
        ("HOST/team", True),
        ("HOST/team/app", True),
        ("HOST/tea", False),
        ("HOST/other", False),
        ("other.test", False),
    ],
)
async def test_entry_of_the_registry_is_used(
    registry: FakeRegistry, tmp_path: Path, key: str, found: bool
) -> None:
    content = {"auths": {key.replace("HOST", registry.address): {"auth": PAIR}}}
    assert await pulls(registry, tmp_path, content) == found


async def test_closest_entry_is_used(registry: FakeRegistry, tmp_path: Path) -> None:
    wrong = {"username": "someone", "password": "else"}
    auths = {registry.address: wrong, f"{registry.address}/team": {"auth": PAIR}}
    assert await pulls(registry, tmp_path, {"auths": auths})


async def test_credentials_of_the_request_are_used_alone(registry: FakeRegistry, tmp_path: Path) -> None:
    store = open_store(tmp_path, auth_file=write(tmp_path, {"auths": {registry.address: {"auth": PAIR}}}))
    wrong = Auth(username="someone", password="else")
    assert isinstance(await pull_error(store, f"{registry.address}/team/app:1", wrong), Unauthorized)


@pytest.mark.parametrize("content", ["", "{", '{"auths": 3}', "[" * 5000, '{"auths": {"HOST": null}}'])
async def test_file_that_cannot_be_read_is_logged_and_left_out(
    registry: FakeRegistry, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert not await pulls(registry, tmp_path, content)
    assert "auth.json" in caplog.text


async def test_file_that_does_not_exist_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    host = Host(scheme="https", address="a.test")
    assert await NodeCredentials(tmp_path / "absent").find(host, parse("a.test/x")) is None
    assert not caplog.text


@pytest.mark.parametrize("store", ["credHelpers", "credsStore"])
async def test_helper_is_asked_for_the_registry(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    answer = json.dumps({"ServerURL": "x", "Username": "user", "Secret": "hunter2-secret"})
    write_helper(tmp_path, monkeypatch, f"[ $1 = get ] && cat >{tmp_path}/asked && echo '{answer}'")
    named: object = {registry.address: "test"} if store == "credHelpers" else "test"
    assert await pulls(registry, tmp_path, {store: named})
    assert (tmp_path / "asked").read_text() == registry.address


async def test_helper_with_an_identity_token_gives_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_helper(tmp_path, monkeypatch, """cat >/dev/null; echo '{"Username": "<token>", "Secret": "t"}'""")
    host = Host(scheme="https", address="a.test")
    credentials = NodeCredentials(write(tmp_path, {"credsStore": "test"}))
    assert await credentials.find(host, parse("a.test/x")) == Auth(
        identity_token="t", server_address="a.test"
    )


async def test_docker_hub_is_found_by_each_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(scheme="https", address="registry-1.docker.io")
    for key in ("https://index.docker.io/v1/", "docker.io", "registry-1.docker.io"):
        credentials = NodeCredentials(write(tmp_path, {"auths": {key: {"username": "u", "password": "p"}}}))
        found = await credentials.find(host, parse("busybox"))
        assert found == Auth(username="u", password="p", server_address=host.address)
    write_helper(tmp_path, monkeypatch, f"cat >{tmp_path}/asked; exit 1")
    await NodeCredentials(write(tmp_path, {"credsStore": "test"})).find(host, parse("busybox"))
    assert (tmp_path / "asked").read_text() == "https://index.docker.io/v1/"


@pytest.mark.parametrize(
    ("script", "logged"),
    [
        ("echo 'credentials not found in native keychain'; exit 1", ""),
        ("echo locked >&2; exit 3", "status 3"),
        ("echo secret-output", "gave no credentials"),
        ("exec sleep 60", "cannot be asked"),
    ],
)
async def test_helper_without_an_answer_leaves_the_file_to_be_asked(
    registry: FakeRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    script: str,
    logged: str,
) -> None:
    monkeypatch.setattr("image.node_credentials.HELPER_TIMEOUT_S", 5.0 if "sleep" not in script else 0.2)
    caplog.set_level(logging.WARNING)
    write_helper(tmp_path, monkeypatch, script)
    auths = {registry.address: {"auth": PAIR}}
    assert await pulls(registry, tmp_path, {"credsStore": "test", "auths": auths})
    assert logged in caplog.text and bool(logged) == bool(caplog.text)
    assert "secret-output" not in caplog.text


async def test_mirror_gets_only_what_is_kept_for_itself(registry: FakeRegistry, tmp_path: Path) -> None:
    hosts = write_hosts(
        tmp_path, "a.test", f'server = "http://{registry.address}"\n[host."http://{registry.address}"]\n'
    )
    auths = {"a.test": {"username": "for", "password": "a.test"}, registry.address: {"auth": PAIR}}
    store = open_store(tmp_path, config_path=hosts, auth_file=write(tmp_path, {"auths": auths}))
    await store.pull("a.test/team/app:1")
    await store.close()
    shown = {seen.headers.get("authorization", "") for seen in registry.seen}
    assert shown == {"", f"Basic {PAIR}"}
