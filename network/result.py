"""Results of CNI plug-ins in one shape, whatever version of the CNI SPEC they are printed in.

`Result` has the shape of 1.1.0. How the versions differ (CNI SPEC, "Result types"):

    0.1, 0.2      ip4 and ip6 objects, each with ip, gateway, routes; no interfaces
    0.3.0, 0.3.1, 0.4.0    interfaces, ips with a "version" of "4" or "6", routes
    1.0.0         ips without "version"
    1.1.0         interfaces may have mtu, socketPath, pciID; routes mtu, advmss, priority, table, scope

Plug-ins are trusted as the administrator's, but not to print what they should: anything that does not fit is
a ValueError that says where. Pure.
"""

from __future__ import annotations

import ipaddress

import msgspec

NEWEST = "1.1.0"
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", NEWEST)  # that a configuration may have


class Address(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An entry of `ips`."""

    version: str = ""
    address: str  # CIDR
    gateway: str = ""
    interface: int | None = None  # index into interfaces


class ResultInterface(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An entry of `interfaces`: a device that a plug-in created or moved."""

    name: str
    mac: str = ""
    mtu: int = 0
    sandbox: str = ""  # path of its namespace; empty: an interface of the host
    socket_path: str = msgspec.field(default="", name="socketPath")
    pci_id: str = msgspec.field(default="", name="pciID")


class ResultRoute(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An entry of `routes`."""

    dst: str
    gw: str = ""
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int | None = None
    scope: int | None = None


class ResultDns(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The `dns` object."""

    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A result of ADD. Its addresses are valid CIDRs, and their interface indexes exist."""

    version: str = msgspec.field(default="", name="cniVersion")
    interfaces: tuple[ResultInterface, ...] | None = None  # plug-ins in Go print null for none
    ips: tuple[Address, ...] | None = None
    routes: tuple[ResultRoute, ...] | None = None
    dns: ResultDns = ResultDns()


class _OldFamily(msgspec.Struct, frozen=True, kw_only=True):
    ip: str
    gateway: str = ""
    routes: tuple[ResultRoute, ...] | None = None


class _OldResult(msgspec.Struct, frozen=True, kw_only=True):
    version: str = msgspec.field(default="", name="cniVersion")
    ip4: _OldFamily | None = None
    ip6: _OldFamily | None = None
    dns: ResultDns = ResultDns()


def version_key(version: str) -> tuple[int, ...]:
    """Return a key that orders versions such as "1.1.0". Raises ValueError for any other text."""
    parts = version.split(".")
    if not 1 <= len(parts) <= 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{version!r} is not a version")
    return tuple(map(int, parts)) + (0,) * (3 - len(parts))


def parse_result(data: bytes, default_version: str) -> Result:
    """Parse what a plug-in printed. `default_version`, the configuration's, applies where it has none.

    Raises ValueError (msgspec.DecodeError is one) for anything that is not a result.
    """
    version = msgspec.json.decode(data, type=_Versioned).version or default_version
    if version_key(version) > version_key(NEWEST):
        raise ValueError(f"result version {version} is newer than {NEWEST}")
    if version_key(version) < (0, 3, 0):
        result = _from_old(msgspec.json.decode(data, type=_OldResult))
    else:
        result = msgspec.json.decode(data, type=Result)
    _check(result)
    return msgspec.structs.replace(result, version=version)


class _Versioned(msgspec.Struct, frozen=True, kw_only=True):
    version: str = msgspec.field(default="", name="cniVersion")


def _from_old(old: _OldResult) -> Result:
    families = [family for family in (old.ip4, old.ip6) if family]
    return Result(
        ips=tuple(Address(address=family.ip, gateway=family.gateway) for family in families),
        routes=tuple(route for family in families for route in family.routes or ()),
        dns=old.dns,
    )


def _check(result: Result) -> None:
    interfaces = result.interfaces or ()
    for each in result.ips or ():
        ipaddress.ip_interface(each.address)
        if each.interface is not None and not 0 <= each.interface < len(interfaces):
            raise ValueError(f"address {each.address} names interface {each.interface} of {len(interfaces)}")


def render_result(result: Result, version: str) -> bytes:
    """Render a result as JSON of a version, 0.3.0 or newer, for prevResult."""
    key = version_key(version)
    ips = [
        msgspec.structs.replace(each, version=_family(each.address) if key < (1, 0, 0) else "")
        for each in result.ips or ()
    ]
    interfaces, routes = result.interfaces or (), result.routes or ()
    if key < (1, 1, 0):
        interfaces = tuple(
            ResultInterface(name=each.name, mac=each.mac, sandbox=each.sandbox) for each in interfaces
        )
        routes = tuple(ResultRoute(dst=each.dst, gw=each.gw) for each in routes)
    return msgspec.json.encode(
        Result(version=version, interfaces=interfaces, ips=tuple(ips), routes=routes, dns=result.dns)
    )


def _family(address: str) -> str:
    return str(ipaddress.ip_interface(address).version)
