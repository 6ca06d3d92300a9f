"""Reads the interfaces and routes of a pod's namespace from the kernel: what the guest is given.

A plug-in's result says what it did; a later plug-in (tuning, sbr) or the kernel may have changed it, and
results have no MTU before 1.1.0. So the result only orders the interfaces and the pod's addresses, and
everything else is read here, with interfaces that it does not name. Called in a thread inside the namespace.

Not passed to the guest: routes of tables other than main, routing rules, all but the first hop of a multipath
route, preferred source addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pyroute2 import IPRoute

from network.errors import TapError
from network.result import Result
from network.spec import IFNAME, Interface, Route

_IFF_UP, _IFF_LOOPBACK = 1, 8  # netdevice(7)
_ETHERNET = 1  # ARPHRD_ETHER
_LINK_LOCAL = ipaddress.IPv6Network("fe80::/10")  # the guest's kernel generates its own
_TABLE_MAIN = 254  # rtnetlink(7)
_UNICAST = 1
_ON_LINK = 4  # RTNH_F_ONLINK

Links = Mapping[str, Any]  # of the kernel's messages, by interface name


@contextlib.contextmanager
def open_netlink() -> Iterator[Any]:
    """Open rtnetlink in the thread's namespace.

    It gets a new SelectorEventLoop, as pyroute2 does not run on uvloop, which may be the policy.
    """
    loop = asyncio.SelectorEventLoop()
    try:
        with IPRoute(use_event_loop=loop) as netlink:
            yield netlink
    finally:
        loop.close()


def list_links(netlink: Any) -> Links:
    """List the interfaces of the namespace by name."""
    return {link.get_attr("IFLA_IFNAME"): link for link in netlink.get_links()}


def read_links(netlink: Any, links: Links, result: Result) -> tuple[tuple[Interface, ...], tuple[Route, ...]]:
    """Read the pod's interfaces, in the result's order and each with the name of its tap, and their routes.

    Raises TapError when an interface of the result does not exist or is not an Ethernet device.
    """
    found = [(each, f"{_own(each)}/{each['prefixlen']}") for each in netlink.get_addr()]
    addressed = {each["index"] for each, cidr in found if not _is_link_local(cidr)}
    names = find_names(result, links, addressed)
    indexes = {int(links[name]["index"]): name for name in names}
    routes = [
        _route(each, indexes)
        for each in netlink.get_routes(table=_TABLE_MAIN)
        if each["type"] == _UNICAST and _hop(each)[0] in indexes
    ]
    cidrs: dict[str, list[str]] = {name: [] for name in names}
    for each, cidr in found:
        if each["index"] in indexes:
            cidrs[indexes[each["index"]]].append(cidr)
    interfaces = tuple(
        Interface(
            name=name,
            tap=f"tap{number}",
            mac=links[name].get_attr("IFLA_ADDRESS"),
            mtu=links[name].get_attr("IFLA_MTU"),
            addresses=guest_addresses(cidrs[name], name, routes),
        )
        for number, name in enumerate(names)
    )
    return interfaces, guest_routes(routes, interfaces)


def find_names(result: Result, links: Links, addressed: Collection[int] = ()) -> list[str]:
    """Name the pod's interfaces: those that the result puts into a sandbox, then every other one that is up,
    as plug-ins of several networks report the first alone. IFNAME comes first in any case.
    `addressed` are the indexes of those that have an address.

    Raises TapError when there is none, or one of the result does not exist or is not an Ethernet device.
    """
    named = [each.name for each in result.interfaces or () if each.sandbox]
    for name in named:
        if name not in links:
            raise TapError(name, "find", "the CNI result names it, but it is not in the namespace")
    others = [name for name, link in links.items() if _is_own(link, addressed)]
    names = [name for name in dict.fromkeys([*named, *others]) if not links[name]["flags"] & _IFF_LOOPBACK]
    for name in names:
        if links[name]["ifi_type"] != _ETHERNET:
            raise TapError(name, "find", "it is not an Ethernet device, so a VM cannot have it")
    if not names:
        raise TapError("(none)", "find", "the CNI plug-ins created no interface in the namespace")
    return sorted(names, key=lambda name: name != IFNAME)


def _is_own(link: Any, addressed: Collection[int]) -> bool:
    """Return whether an interface that the result does not name is the pod's: not a tap, a port of a bridge
    or bond, or, without an address, the other end of an interface of the same namespace."""
    info = link.get_attr("IFLA_LINKINFO")
    is_tap = info is not None and info.get_attr("IFLA_INFO_KIND") == "tun"
    if link["ifi_type"] != _ETHERNET or not link["flags"] & _IFF_UP or is_tap or link.get_attr("IFLA_MASTER"):
        return False
    is_inner = link.get_attr("IFLA_LINK") and link.get_attr("IFLA_LINK_NETNSID") is None
    return not is_inner or link["index"] in addressed


def guest_addresses(cidrs: Sequence[str], name: str, routes: Sequence[Route]) -> tuple[str, ...]:
    """Return the addresses that the guest has to set, as CIDRs; link-local ones are left out.

    A kernel adds the route to an address's network by itself. Where a plug-in removed that route (ptp does,
    so that all traffic goes through the gateway), the guest gets the address as a host address (/32, /128).
    """
    connected = {(each.destination, each.interface) for each in routes if not each.gateway}
    found = []
    for cidr in cidrs:
        address = ipaddress.ip_interface(cidr)
        if address.version == 6 and address in _LINK_LOCAL:
            continue
        whole = (str(address.network), name) in connected
        found.append(cidr if whole else f"{address.ip}/{address.max_prefixlen}")
    return tuple(found)


def guest_routes(routes: Sequence[Route], interfaces: Sequence[Interface]) -> tuple[Route, ...]:
    """Select the routes that the guest's kernel does not add by itself.

    Those without a gateway come first, as a gateway must be reachable when a route names it.
    """
    automatic = {
        (str(ipaddress.ip_interface(cidr).network), nic.name) for nic in interfaces for cidr in nic.addresses
    }
    kept = [
        each
        for each in routes
        if each.gateway
        or ((each.destination, each.interface) not in automatic and not _is_link_local(each.destination))
    ]
    return tuple(sorted(kept, key=lambda route: bool(route.gateway)))


def _own(address: Any) -> str:
    """Return the address itself: IFA_ADDRESS is the peer's where it is point-to-point."""
    return str(address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS"))


def _is_link_local(cidr: str) -> bool:
    network = ipaddress.ip_interface(cidr).network
    return isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_LINK_LOCAL)


def _hop(message: Any) -> tuple[int | None, str, int]:
    """Return interface, gateway and flags of a route's only or first hop."""
    hops = message.get_attr("RTA_MULTIPATH")
    if hops:
        return hops[0]["oif"], hops[0].get_attr("RTA_GATEWAY") or "", hops[0]["flags"]
    return message.get_attr("RTA_OIF"), message.get_attr("RTA_GATEWAY") or "", message["flags"]


def _route(message: Any, indexes: Mapping[int, str]) -> Route:
    index, gateway, flags = _hop(message)
    assert index is not None
    anywhere = "0.0.0.0" if message["family"] == socket.AF_INET else "::"
    metrics = message.get_attr("RTA_METRICS")
    return Route(
        destination=f"{message.get_attr('RTA_DST') or anywhere}/{message['dst_len']}",
        gateway=gateway,
        interface=indexes[index],
        metric=message.get_attr("RTA_PRIORITY") or 0,
        mtu=(metrics.get_attr("RTAX_MTU") or 0) if metrics else 0,
        on_link=bool(gateway and flags & _ON_LINK),
    )
