"""Choose the proxy for a URL from the environment, as Go programs do (x/net/http/httpproxy). Pure.

Nodes are set up for containerd and the kubelet, so NO_PROXY must mean the same here:

    HTTP_PROXY, HTTPS_PROXY   for http and https URLs; ALL_PROXY for both if they are not set (not Go's)
    NO_PROXY                  *, or a list of: CIDR, IP[:PORT], DOMAIN[:PORT] (also its subdomains),
                              .DOMAIN[:PORT] or *.DOMAIN[:PORT] (only its subdomains)

Variables in lower case count where those in upper case are not set. Loopback addresses and localhost are
never reached through a proxy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from image.hosts import is_loopback

_PORTS = {"http": 80, "https": 443}


class ProxyRules:
    """The proxy settings of one environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        def value(name: str) -> str:
            return environment.get(name) or environment.get(name.lower()) or ""

        everything = value("ALL_PROXY")
        self._proxies = {
            "http": _with_scheme(value("HTTP_PROXY") or everything),
            "https": _with_scheme(value("HTTPS_PROXY") or everything),
        }
        self._exceptions = [part.strip().lower() for part in value("NO_PROXY").split(",") if part.strip()]

    def find(self, url: str) -> str:
        """Return the URL of the proxy for `url`; empty for a direct connection."""
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme, "")
        host = (parts.hostname or "").rstrip(".")
        if not proxy or is_loopback(parts.netloc.rpartition("@")[2]):
            return ""
        port = parts.port or _PORTS[parts.scheme]
        return "" if any(_excepts(each, host, port) for each in self._exceptions) else proxy


def _with_scheme(proxy: str) -> str:
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _excepts(exception: str, host: str, port: int) -> bool:
    """Return whether one element of NO_PROXY, in lower case, matches; an invalid one matches nothing."""
    if exception == "*":
        return True
    address = _address(host)
    if "/" in exception:
        return address is not None and _in_network(address, exception)
    name, own_port = _split_port(exception)
    if own_port is not None and own_port != port:
        return False
    if (own := _address(name)) is not None:
        return own == address
    if not name or address is not None:
        return False
    name = name.removeprefix("*") if name.startswith("*.") else name
    if name.startswith("."):
        return host.endswith(name)
    return host == name or host.endswith(f".{name}")


def _split_port(text: str) -> tuple[str, int | None]:
    """Split "host:port"; an IPv6 address has a port only in brackets."""
    if _address(text) is not None:
        return text, None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or len(port) > 5:
        return text.strip("[]"), None
    return host.strip("[]"), int(port)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _in_network(address: ipaddress.IPv4Address | ipaddress.IPv6Address, network: str) -> bool:
    try:
        return address in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
