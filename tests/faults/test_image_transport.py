"""The registry client against a registry that fails, redirects, asks for credentials or has mirrors."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from image.auth import Auth
from image.errors import (
    RegistryUnavailable,
    Unauthorized,
)
from image.image_store import ImageStore
from tests.fakes.registry import (
    Corrupt,
    FakeRegistry,
    Fault,
    Hang,
    StallAfter,
    Status,
    Truncate,
)
from tests.kit.pulls import BASE, QUICK, TOP, credentials, open_store, pull_error, write_hosts

# ------------------------------------------------------------------------------------------ retry and resume


async def test_pull_from_closed_port_fails(store: ImageStore) -> None:
    error = await pull_error(store, "127.0.0.1:9/a:1")
    assert str(error).startswith("RegistryUnavailable")


@pytest.mark.parametrize("fault", [Status(500), Status(503), Status(429), Truncate(10), Hang()])
async def test_temporary_failure_is_retried(registry: FakeRegistry, store: ImageStore, fault: Fault) -> None:
    registry.put_image("a", "1", [BASE])
    registry.fail("/manifests/", fault)
    registry.fail(registry.layer_digests("a", "1")[0], fault)
    assert (await store.pull(f"{registry.address}/a:1")).size > 0
    await store.close()


@pytest.mark.parametrize("fault", [Status(500), Status(429), Truncate(10), Hang()])
async def test_repeated_temporary_failure_fails_after_all_attempts(
    registry: FakeRegistry, store: ImageStore, fault: Fault
) -> None:
    registry.put_image("a", "1", [BASE])
    registry.fail("/manifests/", fault, times=99)
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, RegistryUnavailable)
    assert str(error).startswith("RegistryUnavailable")
    assert error.attempts == QUICK.attempts


async def test_retry_waits_as_long_as_retry_after(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [BASE])
    registry.fail("/manifests/", Status(429, {"Retry-After": "1"}))
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await store.pull(f"{registry.address}/a:1")
    assert loop.time() - begun >= 1.0
    await store.close()


async def test_retry_after_above_limit_fails_at_once(registry: FakeRegistry, store: ImageStore) -> None:
    registry.fail("/manifests/", Status(429, {"Retry-After": "3600"}), times=9)
    error = await pull_error(store, f"{registry.address}/a:1")
    assert "3600 s" in str(error)


@pytest.mark.parametrize("fault", [Truncate(150_000), StallAfter(150_000)])
@pytest.mark.parametrize("ranges", [True, False])
async def test_broken_download_resumes_at_the_last_byte(
    registry: FakeRegistry, store: ImageStore, fault: Fault, ranges: bool
) -> None:
    registry.ranges = ranges
    registry.put_image("a", "1", [TOP])
    digest = registry.layer_digests("a", "1")[0]
    registry.fail(digest, fault)
    await store.pull(f"{registry.address}/a:1")
    asked = [seen.headers.get("range") for seen in registry.seen if seen.path.endswith(digest)]
    assert asked == [None, "bytes=150000-"]
    await store.close()


async def test_download_without_progress_fails(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [TOP])
    digest = registry.layer_digests("a", "1")[0]
    registry.fail(digest, Truncate(0), times=99)
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, RegistryUnavailable)


# -------------------------------------------------------------------------------------------- authentication


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
async def test_pull_with_each_credential_form_succeeds(
    registry: FakeRegistry, store: ImageStore, scheme: str, form: str
) -> None:
    registry.sign_in = scheme
    registry.put_image("a", "1", [BASE, TOP])
    image = await store.pull(f"{registry.address}/a:1", credentials(registry, form))
    assert image.size > 0
    # one token serves the whole pull
    assert registry.paths().count("/token") == (1 if scheme == "bearer" and form != "registry" else 0)
    await store.close()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirect_of_the_token_service_is_followed(
    registry: FakeRegistry, store: ImageStore, status: int
) -> None:
    registry.sign_in = "bearer"
    registry.put_image("a", "1", [BASE])
    registry.fail("/token", Status(status, {"Location": "/token?service=test.service"}))
    assert (await store.pull(f"{registry.address}/a:1", credentials(registry, "password"))).size > 0
    assert registry.paths().count("/token") == 2
    await store.close()


async def test_redirect_of_the_token_service_keeps_the_posted_form(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.sign_in = "bearer"
    registry.put_image("a", "1", [BASE])
    registry.fail("/token", Status(307, {"Location": "/token"}))
    assert (await store.pull(f"{registry.address}/a:1", credentials(registry, "identity"))).size > 0
    await store.close()


async def test_redirect_of_the_token_service_to_another_host_drops_credentials(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.sign_in = "bearer"
    registry.put_image("a", "1", [BASE])
    with FakeRegistry(open_tokens=True).serving() as other:
        registry.fail("/token", Status(307, {"Location": f"http://{other.address}/token"}), times=2)
        assert (await store.pull(f"{registry.address}/a:1", credentials(registry, "password"))).size > 0
        assert [seen.method for seen in other.seen] == ["GET"]
        assert "authorization" not in other.seen[0].headers
        # an identity token is the question itself, so it cannot be asked without
        error = await pull_error(
            open_store(Path(store.fs_usage().mountpoint)), f"{registry.address}/a:1",
            credentials(registry, "identity"),
        )  # fmt: skip
        assert isinstance(error, Unauthorized) and "another host" in str(error)
        assert len(other.seen) == 1
    await store.close()


async def test_redirect_loop_of_the_token_service_fails(registry: FakeRegistry, store: ImageStore) -> None:
    registry.sign_in = "bearer"
    registry.fail("/token", Status(307, {"Location": "/token"}), times=99)
    error = await pull_error(store, f"{registry.address}/a:1", credentials(registry, "password"))
    assert isinstance(error, Unauthorized) and "too many redirects" in str(error)


@pytest.mark.parametrize(
    "body", [{"token": None, "access_token": "token-secret"}, {"token": "token-secret", "access_token": None}]
)
async def test_token_with_status_201_and_null_fields_is_used(
    registry: FakeRegistry, store: ImageStore, body: dict[str, str | None]
) -> None:
    registry.sign_in = "bearer"
    registry.put_image("a", "1", [BASE])
    registry.fail("/token", Status(201, body=json.dumps(body).encode()))
    assert (await store.pull(f"{registry.address}/a:1")).size > 0
    await store.close()


@pytest.mark.parametrize("in_one_line", [False, True])
@pytest.mark.parametrize(
    "others", [("Negotiate",), ("Negotiate YII=", "NTLM", 'Digest realm="x", nonce="y"')]
)
async def test_pull_with_other_challenges_before_basic_succeeds(
    registry: FakeRegistry, store: ImageStore, others: tuple[str, ...], in_one_line: bool
) -> None:
    registry.sign_in = "basic"
    registry.challenges_before, registry.challenges_in_one_line = others, in_one_line
    registry.put_image("a", "1", [BASE])
    assert (await store.pull(f"{registry.address}/a:1", credentials(registry, "password"))).size > 0
    await store.close()


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
@pytest.mark.parametrize("form", ["none", "wrong"])
async def test_refused_credentials_do_not_appear_in_the_error(
    registry: FakeRegistry, store: ImageStore, scheme: str, form: str
) -> None:
    registry.sign_in = scheme
    auth = Auth() if form == "none" else Auth(username="eve", password="guessed-secret")
    error = await pull_error(store, f"{registry.address}/a:1", auth)
    assert isinstance(error, Unauthorized)
    shown = str(error) + repr(error.__cause__) + repr(auth)
    sent = base64.b64encode(b"eve:guessed-secret").decode()
    assert "secret" not in shown and sent not in shown


async def test_refused_registry_token_does_not_appear_in_the_error(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.sign_in = "bearer"
    error = await pull_error(store, f"{registry.address}/a:1", Auth(registry_token="stale-secret"))
    assert isinstance(error, Unauthorized) and "stale-secret" not in str(error)


async def test_credentials_for_another_host_are_not_sent(registry: FakeRegistry, store: ImageStore) -> None:
    registry.sign_in = "basic"
    auth = credentials(registry, "password", server_address="https://other.example.com/v1/")
    assert isinstance(await pull_error(store, f"{registry.address}/a:1", auth), Unauthorized)
    assert not any("authorization" in seen.headers for seen in registry.seen)


async def test_credentials_with_matching_server_address_are_sent(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.sign_in = "basic"
    registry.put_image("a", "1", [BASE])
    auth = credentials(registry, "password", server_address=registry.address)
    assert (await store.pull(f"{registry.address}/a:1", auth)).size > 0
    await store.close()


async def test_redirect_to_another_host_drops_credentials(registry: FakeRegistry, store: ImageStore) -> None:
    registry.sign_in = "basic"
    registry.put_image("a", "1", [BASE])
    digest = registry.layer_digests("a", "1")[0]
    with FakeRegistry(blobs=registry.blobs).serving() as storage:
        url = f"http://{storage.address}/v2/x/blobs/{digest}?signature=abc"
        registry.fail(f"/v2/a/blobs/{digest}", Status(307, {"Location": url}))
        await store.pull(f"{registry.address}/a:1", credentials(registry, "password"))
        assert len(storage.seen) == 1
        assert "authorization" not in storage.seen[0].headers
    await store.close()


async def test_redirect_loop_fails(registry: FakeRegistry, store: ImageStore) -> None:
    registry.fail("/manifests/", Status(302, {"Location": "/v2/a/manifests/1"}), times=99)
    assert isinstance(await pull_error(store, f"{registry.address}/a:1"), RegistryUnavailable)


BAD_URLS = [
    "http://[::1",
    "http://a:99999/",
    "http://a:0/",
    "http://a:x/",
    "http://:80/",
    "http://a\x7f/",
    "ftp://a/",
]


@pytest.mark.parametrize("url", BAD_URLS)
async def test_redirect_to_invalid_url_fails(registry: FakeRegistry, store: ImageStore, url: str) -> None:
    registry.fail("/manifests/", Status(307, {"Location": url}), times=99)
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, RegistryUnavailable) and error.what == "redirect"


@pytest.mark.parametrize("url", BAD_URLS)
async def test_token_service_with_invalid_url_is_refused(
    registry: FakeRegistry, store: ImageStore, url: str
) -> None:
    registry.sign_in, registry.realm = "bearer", url
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, Unauthorized) and "token service" in str(error)


async def test_redirect_to_file_url_fails(registry: FakeRegistry, store: ImageStore) -> None:
    registry.fail("/manifests/", Status(302, {"Location": "file:///etc/passwd"}), times=99)
    assert isinstance(await pull_error(store, f"{registry.address}/a:1"), RegistryUnavailable)


# ------------------------------------------------------------------------------------------------ connections


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port whose connections are never established: its listener's queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as clients:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


async def test_dial_timeout_of_hosts_toml_limits_the_connect(silent_port: int, tmp_path: Path) -> None:
    text = f'server = "http://127.0.0.1:{silent_port}"\ndial_timeout = "100ms"\n'
    slow_connect = msgspec.structs.replace(QUICK, connect_s=60.0, attempts=1)
    store = open_store(
        tmp_path, timing=slow_connect, config_path=write_hosts(tmp_path, "some.example.com", text)
    )
    async with asyncio.timeout(30):
        error = await pull_error(store, "some.example.com/a:1")
    assert isinstance(error, RegistryUnavailable) and error.problem == "no connection in time"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without the machine's own proxies."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("no_proxy", ["", "other.example.com", "10.0.0.0/8"])
async def test_registry_is_reached_through_the_proxy_of_the_environment(
    registry: FakeRegistry, tmp_path: Path, environment: pytest.MonkeyPatch, no_proxy: str
) -> None:
    """The double is the proxy: it answers for any host."""
    environment.setenv("HTTP_PROXY", f"http://{registry.address}")
    environment.setenv("NO_PROXY", no_proxy)
    registry.put_image("a", "1", [BASE])
    certs = write_hosts(tmp_path, "some.example.com", 'server = "http://registry.invalid"\n')
    store = open_store(tmp_path, config_path=certs)
    assert (await store.pull("some.example.com/a:1")).size > 0
    await store.close()


@pytest.mark.parametrize("no_proxy", ["*", "0.0.0.0", "0.0.0.0:{port}", "x.test,0.0.0.0/8"])
async def test_registry_in_no_proxy_is_reached_directly(
    registry: FakeRegistry, tmp_path: Path, environment: pytest.MonkeyPatch, no_proxy: str
) -> None:
    """0.0.0.0 connects to this host, and is not a loopback address."""
    port = registry.address.rpartition(":")[2]
    environment.setenv("http_proxy", "127.0.0.1:9")
    registry.put_image("a", "1", [BASE])
    certs = write_hosts(tmp_path, "some.example.com", f'server = "http://0.0.0.0:{port}"\n')
    error = await pull_error(open_store(tmp_path, config_path=certs), "some.example.com/a:1")
    assert isinstance(error, RegistryUnavailable) and registry.seen == []
    environment.setenv("no_proxy", no_proxy.format(port=port))
    store = open_store(tmp_path, config_path=certs)
    assert (await store.pull("some.example.com/a:1")).size > 0
    await store.close()


async def test_registry_on_loopback_is_reached_directly(
    registry: FakeRegistry, store: ImageStore, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    environment.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    registry.put_image("a", "1", [BASE])
    assert (await store.pull(f"{registry.address}/a:1")).size > 0
    await store.close()


async def test_unusable_proxy_fails_without_retry_and_without_its_password(
    tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("HTTP_PROXY", "ftp://user:proxy-secret@proxy.invalid:21")
    certs = write_hosts(tmp_path, "some.example.com", 'server = "http://registry.invalid"\n')
    error = await pull_error(open_store(tmp_path, config_path=certs), "some.example.com/a:1")
    assert isinstance(error, RegistryUnavailable) and error.attempts == 1
    assert "proxy.invalid" in str(error) and "proxy-secret" not in str(error)


# --------------------------------------------------------------------------------------------------- mirrors


async def test_mirror_is_asked_first_with_namespace_and_headers(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    registry.put_image("library/box", "1", [BASE])
    certs = write_hosts(
        tmp_path, "docker.io",
        f'server = "http://127.0.0.1:9"\n[host."http://{registry.address}"]\n'
        'capabilities = ["pull", "resolve"]\n'
        f'[host."http://{registry.address}".header]\nx-thing = ["one"]\n',
    )  # fmt: skip
    store = open_store(tmp_path, config_path=certs)
    image = await store.pull("box:1")
    assert image.repo_tags == ("docker.io/library/box:1",)
    assert registry.seen[0].query == {"ns": ["docker.io"]}
    assert registry.seen[0].headers["x-thing"] == "one"
    await store.close()


@pytest.mark.parametrize("fault", [Status(404), Status(500), Status(401), Corrupt()])
async def test_failing_mirror_falls_back_to_the_registry(
    registry: FakeRegistry, tmp_path: Path, fault: Fault
) -> None:
    digest = registry.put_image("a", "1", [BASE])
    with FakeRegistry(blobs=registry.blobs, manifests=registry.manifests).serving() as mirror:
        mirror.fail("/", fault, times=99)
        certs = write_hosts(
            tmp_path, "some.example.com",
            f'server = "http://{registry.address}"\n[host."http://{mirror.address}"]\n',
        )  # fmt: skip
        store = open_store(tmp_path, config_path=certs)
        image = await store.pull(f"some.example.com/a@{digest}")
        assert image.size > 0 and mirror.seen
    await store.close()


async def test_mirror_without_resolve_capability_is_not_asked_for_tags(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    """A mirror that may only pull is not asked what a tag means."""
    registry.put_image("cache/a", "1", [BASE])
    registry.put_image("a", "1", [BASE])
    with FakeRegistry(blobs=registry.blobs, manifests=registry.manifests).serving() as mirror:
        certs = write_hosts(
            tmp_path, "_default",
            f'server = "http://{registry.address}"\n[host."http://{mirror.address}/v2/cache"]\n'
            'capabilities = ["pull"]\noverride_path = true\n',
        )  # fmt: skip
        store = open_store(tmp_path, config_path=certs)
        await store.pull("some.example.com/a:1")
        assert "/v2/a/manifests/1" in registry.paths()
        assert mirror.paths() and all(path.startswith("/v2/cache/a/blobs/") for path in mirror.paths())
    await store.close()


async def test_credentials_for_the_registry_are_not_sent_to_a_mirror(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    registry.sign_in = "basic"
    certs = write_hosts(tmp_path, "some.example.com", f'server = "http://{registry.address}"\n')
    store = open_store(tmp_path, config_path=certs)
    auth = credentials(registry, "password", server_address="some.example.com")
    registry.put_image("a", "1", [BASE])
    assert (await store.pull("some.example.com/a:1", auth)).size > 0
    with FakeRegistry(sign_in="basic").serving() as mirror:
        file = certs / "some.example.com" / "hosts.toml"
        file.write_text(f'server = "http://{registry.address}"\n[host."http://{mirror.address}"]\n')
        await store.pull("some.example.com/a:1", auth)
        assert mirror.seen and not any("authorization" in seen.headers for seen in mirror.seen)
    await store.close()


# ------------------------------------------------------------------------------------------------------- TLS


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
async def test_https_registry_with_configured_trust_succeeds(
    secure: FakeRegistry, certificate: Path, tmp_path: Path, setting: str
) -> None:
    secure.put_image("a", "1", [BASE])
    text = f'server = "https://{secure.address}"\n{setting.format(ca=certificate / "ca.pem")}\n'
    certs = write_hosts(tmp_path, secure.address.replace(":", "_") + "_", text)
    store = open_store(tmp_path, config_path=certs)
    assert (await store.pull(f"{secure.address}/a:1")).size > 0
    await store.close()


async def test_https_registry_with_unknown_authority_fails_without_retry(
    secure: FakeRegistry, tmp_path: Path
) -> None:
    certs = write_hosts(tmp_path, "some.example.com", f'server = "https://{secure.address}"\n')
    error = await pull_error(open_store(tmp_path, config_path=certs), "some.example.com/a:1")
    assert isinstance(error, RegistryUnavailable)
    assert "CERTIFICATE_VERIFY_FAILED" in str(error) and error.attempts == 1
