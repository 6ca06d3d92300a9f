"""hosts.toml and certificate directories, valid and invalid."""

from __future__ import annotations

from pathlib import Path

import pytest

from image.errors import MirrorConfigInvalid
from image.hosts import CAPABILITIES, find_hosts, is_loopback


def write(root: Path, folder: str, text: str) -> Path:
    (root / folder).mkdir(parents=True)
    (root / folder / "hosts.toml").write_text(text)
    return root


def urls(root: Path | None, domain: str) -> list[str]:
    return [host.url for host in find_hosts(root, domain)]


def test_registry_without_configuration_is_asked_itself() -> None:
    assert urls(None, "docker.io") == ["https://registry-1.docker.io/v2"]
    assert urls(Path("/nonexistent"), "a.example.com:5000") == ["https://a.example.com:5000/v2"]
    assert find_hosts(None, "localhost:5000")[0].plain_fallback
    assert not find_hosts(None, "a.example.com")[0].plain_fallback


@pytest.mark.parametrize(
    ("address", "is_one"),
    [
        ("localhost", True), ("localhost:1", True), ("127.0.0.1:5000", True), ("127.9.9.9", True),
        ("[::1]:5000", True), ("10.0.0.1", False),
        ("localhost.example.com", False), ("127.example.com", False),
    ],
)  # fmt: skip
def test_loopback_addresses_are_recognized(address: str, is_one: bool) -> None:
    assert is_loopback(address) is is_one


@pytest.mark.parametrize("folder", ["a.example.com_5000_", "a.example.com:5000", "a.example.com", "_default"])
def test_directory_names_are_tried_in_containerds_order(tmp_path: Path, folder: str) -> None:
    write(tmp_path, folder, 'server = "https://there.example.com"')
    assert urls(tmp_path, "a.example.com:5000") == ["https://there.example.com/v2"]


def test_hosts_keep_order_and_settings_of_the_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        "docker.io",
        """
server = "https://origin.example.com"
skip_verify = true
[host."http://one.example.com:81/some/path"]
  capabilities = ["pull"]
  ca = "ca.pem"
  [host."http://one.example.com:81/some/path".header]
    x-a = "1"
    x-b = ["2", "3"]
[host."two.example.com"]
  client = [["c.pem", "/abs/k.pem"], ["both.pem"]]
[host."https://three.example.com/v2/sub"]
  override_path = true
[host."localhost:5000"]
""",
    )
    one, two, three, local, origin = find_hosts(tmp_path, "docker.io")
    here = tmp_path / "docker.io"
    assert one.url == "http://one.example.com:81/some/path/v2"
    assert (one.capabilities, one.ca) == (frozenset({"pull"}), (str(here / "ca.pem"),))
    assert one.headers == (("x-a", "1"), ("x-b", "2"), ("x-b", "3"))
    assert two.url == "https://two.example.com/v2" and two.capabilities == CAPABILITIES
    assert two.client == ((str(here / "c.pem"), "/abs/k.pem"), (str(here / "both.pem"), ""))
    assert three.url == "https://three.example.com/v2/sub"
    assert local.url == "http://localhost:5000/v2"
    assert origin.url == "https://origin.example.com/v2"
    assert origin.skip_verify and not origin.mirror and one.mirror


def test_mirrors_without_server_keep_the_registry_last(tmp_path: Path) -> None:
    write(tmp_path, "a.example.com", '[host."https://m.example.com"]')
    assert urls(tmp_path, "a.example.com") == ["https://m.example.com/v2", "https://a.example.com/v2"]


def test_directory_of_certificates_without_hosts_toml_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "a.example.com"
    folder.mkdir()
    for name in ("x.crt", "c.cert", "c.key"):
        (folder / name).touch()
    (host,) = find_hosts(tmp_path, "a.example.com")
    assert host.ca == (str(folder / "x.crt"),)
    assert host.client == ((str(folder / "c.cert"), str(folder / "c.key")),)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = [", "hosts.toml"),
        ("serve = 'x'", "serve: unknown key"),
        ("server = 1", "server: must be a string"),
        ("host = 'x'", "host: must be a table"),
        ("[host.'ftp://x']", "is not an http"),
        ("[host.'https://u:p@x']", "is not an http"),
        ("[host.'https://x']\nskip_verify = 'yes'", "skip_verify"),
        ("[host.'https://x']\ncapabilities = ['fly']", "capabilities: unknown: fly"),
        ("[host.'https://x']\nca = 5", "ca: must be"),
        ("[host.'https://x']\nclient = [[1, 2]]", "client: must be"),
        ("[host.'https://x']\nheader = 'x'", "header: must be a table"),
        ("[host.'https://x']\nnonsense = 'x'", "nonsense: unknown key"),
    ],
)
def test_invalid_hosts_toml_is_rejected_with_file_and_key(tmp_path: Path, text: str, named: str) -> None:
    write(tmp_path, "a.example.com", text)
    with pytest.raises(MirrorConfigInvalid, match=named) as caught:
        find_hosts(tmp_path, "a.example.com")
    assert "hosts.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3s", 3.0), ("500ms", 0.5), ("1m30s", 90.0), ("1.5s", 1.5), ("0", None), ("0s", None), ("99h", 3600.0)],
)
def test_dial_timeout_is_a_duration_of_go(tmp_path: Path, text: str, seconds: float | None) -> None:
    write(tmp_path, "a.example.com", f'dial_timeout = "{text}"')
    assert find_hosts(tmp_path, "a.example.com")[0].dial_timeout_s == seconds


@pytest.mark.parametrize("value", ["5", '"5"', '"s"', '"-1s"', '"1 s"', '"1d"', '""', '"1s1"'])
def test_invalid_dial_timeout_is_rejected(tmp_path: Path, value: str) -> None:
    write(tmp_path, "a.example.com", f"[host.'https://x']\ndial_timeout = {value}")
    with pytest.raises(MirrorConfigInvalid, match="dial_timeout: must be a duration"):
        find_hosts(tmp_path, "a.example.com")
