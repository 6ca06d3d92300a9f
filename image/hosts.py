"""Which hosts serve a registry's images: mirrors and TLS settings, in containerd's hosts.toml format.

    CONFIG_PATH/
      HOST_PORT_/hosts.toml    or  HOST:PORT/  or  HOST/  or  _default/ : the first that exists

    server = "https://registry.example.com"
    [host."https://mirror.example.com"]
      capabilities = ["pull", "resolve"]
      ca = "ca.pem"            # relative to the file, or absolute; a string or a list
      client = [["c.pem", "k.pem"]]
      skip_verify = false
      override_path = false    # true: the URL's path is the whole prefix, no /v2 is added
      dial_timeout = "3s"      # for connecting, a duration as Go writes it
      [host."https://mirror.example.com".header]
        x-thing = "value"

Hosts are asked in the order of the file, the server last. The same keys at the top level apply to the server.
The file is read for each pull, so an edit needs no restart.

Source: containerd, docs/hosts.md. A directory without hosts.toml may hold *.crt, *.cert and *.key files
(Docker's certs.d).
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from image.budget import Budget, Limits, OverLimit
from image.errors import MirrorConfigInvalid
from image.reference import DEFAULT_DOMAIN

HUB_SERVER = "registry-1.docker.io"
CAPABILITIES = frozenset(("pull", "resolve"))
_KEYS = frozenset(("capabilities", "ca", "client", "skip_verify", "override_path", "header", "dial_timeout"))

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h)")
_DURATION = re.compile(rf"0|(?:{_DURATION_PART.pattern})+")
_DURATION_LIMIT_S = 3600.0


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """One host to ask, with the settings of its table in hosts.toml."""

    scheme: str  # "http" or "https"
    address: str  # host or host:port
    prefix: str = "/v2"
    capabilities: frozenset[str] = CAPABILITIES
    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()  # certificate, key (empty: in the same file)
    skip_verify: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    dial_timeout_s: float | None = None  # None: Timing.connect_s
    mirror: bool = False
    # the scheme is not configured, and a registry on loopback may not speak TLS: fall back to http
    plain_fallback: bool = False

    @property
    def url(self) -> str:
        """The prefix of all requests, without a slash at its end."""
        return f"{self.scheme}://{self.address}{self.prefix}"


def is_loopback(address: str) -> bool:
    """Return whether a "host" or "host:port" is on loopback: localhost, *.localhost, 127.0.0.0/8 or ::1."""
    host = urlsplit(f"//{address}").hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_hosts(config_path: Path | None, domain: str, limits: Limits | None = None) -> tuple[Host, ...]:
    """Return the hosts to ask for images of registry `domain`, in order; at least one.

    `config_path` is a directory as described above; None or a missing one gives the registry itself.
    Blocking. Raises MirrorConfigInvalid, which names file and key.
    """
    folder = _folder(config_path, domain) if config_path else None
    if folder is None:
        return (_origin(domain),)
    file = folder / "hosts.toml"
    if not file.exists():
        # Docker's layout: certificates only
        return (msgspec.structs.replace(_origin(domain), **_certificates(folder)),)
    limits = limits or Limits()
    try:
        config = tomllib.loads(_read(file, limits))
        found = _Parser(file, domain).hosts(config)
        Budget(limits, "hosts").check(len(found))
    except OverLimit as error:
        raise MirrorConfigInvalid(str(file), error.reason) from error
    except RecursionError as error:
        raise MirrorConfigInvalid(str(file), "tables or lists are nested too deep") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise MirrorConfigInvalid(str(file), str(error)) from error
    return found


def _read(file: Path, limits: Limits) -> str:
    """Raises OSError, UnicodeDecodeError, OverLimit."""
    budget = Budget(limits, "hosts_bytes")
    if file.is_file():
        budget.check(file.stat().st_size)
    with file.open("rb") as opened:
        data = opened.read(budget.limit + 1)
    budget.spend(len(data))
    return data.decode("utf-8")


def _folder(config_path: Path, domain: str) -> Path | None:
    host, colon, port = domain.rpartition(":")
    names = [domain, "_default"]
    if colon and port.isdecimal():
        names = [f"{host}_{port}_", domain, host, "_default"]
    for name in names:
        if (config_path / name).is_dir():
            return config_path / name
    return None


def _certificates(folder: Path) -> dict[str, object]:
    pairs = [(str(c), str(c.with_suffix(".key"))) for c in sorted(folder.glob("*.cert"))]
    return {"ca": tuple(str(f) for f in sorted(folder.glob("*.crt"))), "client": tuple(pairs)}


def _origin(domain: str) -> Host:
    address = HUB_SERVER if domain == DEFAULT_DOMAIN else domain
    return Host(scheme="https", address=address, plain_fallback=is_loopback(address))


class _Parser:
    """Parses one hosts.toml."""

    def __init__(self, file: Path, domain: str) -> None:
        self._file = file
        self._domain = domain

    def hosts(self, config: Mapping[str, object]) -> tuple[Host, ...]:
        """Return the hosts of a parsed file. Raises MirrorConfigInvalid."""
        for key in config:
            if key not in _KEYS and key not in ("server", "host"):
                raise self._invalid(key, "unknown key")
        mirrors = config.get("host", {})
        if not isinstance(mirrors, dict):
            raise self._invalid("host", "must be a table")
        found = [self._host(url, table, mirror=True) for url, table in mirrors.items()]
        server = config.get("server", "")
        if not isinstance(server, str):
            raise self._invalid("server", "must be a string")
        own = {key: value for key, value in config.items() if key in _KEYS}
        if server:
            found.append(self._host(server, own, mirror=False))
        else:
            origin = _origin(self._domain)
            found.append(self._with_settings(origin, own, "server") if own else origin)
        return tuple(found)

    def _host(self, url: str, table: object, *, mirror: bool) -> Host:
        if not isinstance(table, dict):
            raise self._invalid(f'host."{url}"', "must be a table")
        text = url
        try:
            if "://" not in url:
                text = ("http://" if is_loopback(url.partition("/")[0]) else "https://") + url
            parts = urlsplit(text)
        except ValueError as error:  # brackets that do not hold an IPv6 address
            raise self._invalid(f'"{url}"', "is not an http or https URL of a host") from error
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise self._invalid(f'"{url}"', "is not an http or https URL of a host")
        path = parts.path.rstrip("/")
        if table.get("override_path") is not True and not path.endswith("/v2"):
            path += "/v2"
        host = Host(scheme=parts.scheme, address=parts.netloc, prefix=path, mirror=mirror)
        return self._with_settings(host, table, f'host."{url}"')

    def _with_settings(self, host: Host, table: Mapping[str, object], where: str) -> Host:
        for key in table:
            if key not in _KEYS:
                raise self._invalid(f"{where}.{key}", "unknown key")
        capabilities = frozenset(self._strings(table, "capabilities", where)) or CAPABILITIES
        if unknown := capabilities - {"pull", "resolve", "push", "referrers"}:
            raise self._invalid(f"{where}.capabilities", f"unknown: {', '.join(sorted(unknown))}")
        return msgspec.structs.replace(
            host,
            capabilities=capabilities,
            ca=tuple(self._path(p) for p in self._strings(table, "ca", where)),
            client=self._client(table, where),
            skip_verify=self._flag(table, "skip_verify", where),
            headers=self._headers(table, where),
            dial_timeout_s=self._duration(table, "dial_timeout", where),
        )

    def _strings(self, table: Mapping[str, object], key: str, where: str) -> tuple[str, ...]:
        value = table.get(key, [])
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise self._invalid(f"{where}.{key}", "must be a string or a list of strings")
        return tuple(listed)

    def _flag(self, table: Mapping[str, object], key: str, where: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self._invalid(f"{where}.{key}", "must be true or false")
        return value

    def _duration(self, table: Mapping[str, object], key: str, where: str) -> float | None:
        """Parse a duration of Go's time.ParseDuration in seconds; None for one that is absent or zero."""
        value = table.get(key, "0")
        if not isinstance(value, str) or not _DURATION.fullmatch(value):
            raise self._invalid(f"{where}.{key}", 'must be a duration such as "500ms" or "1m30s"')
        seconds = sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION_PART.findall(value))
        return min(seconds, _DURATION_LIMIT_S) or None

    def _client(self, table: Mapping[str, object], where: str) -> tuple[tuple[str, str], ...]:
        """Parse `client`: a file with certificate and key, a list of those, or of [certificate, key]."""
        value = table.get("client", [])
        listed = [value] if isinstance(value, str) else value
        pairs: list[tuple[str, str]] = []
        for item in listed if isinstance(listed, list) else [None]:
            match item:
                case str(both) | [str(both)] | [str(both), ""]:
                    pairs.append((self._path(both), ""))
                case [str(certificate), str(key)]:
                    pairs.append((self._path(certificate), self._path(key)))
                case _:
                    raise self._invalid(f"{where}.client", "must be a file, or a list of [certificate, key]")
        return tuple(pairs)

    def _headers(self, table: Mapping[str, object], where: str) -> tuple[tuple[str, str], ...]:
        value = table.get("header", {})
        if not isinstance(value, dict):
            raise self._invalid(f"{where}.header", "must be a table")
        pairs: list[tuple[str, str]] = []
        for name in value:
            pairs.extend((name, text) for text in self._strings(value, name, f"{where}.header"))
        return tuple(pairs)

    def _path(self, path: str) -> str:
        return str(self._file.parent / path)

    def _invalid(self, key: str, problem: str) -> MirrorConfigInvalid:
        return MirrorConfigInvalid(str(self._file), f"{key}: {problem}")
