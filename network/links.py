"""What the kernel says of the interfaces of a pod's namespace: the truth that the guest is given.

A plug-in's result says what it did; a later plug-in (tuning, sbr) or the kernel may have changed it,
and results leave out the MTU before 1.1.0. So the result only names the interfaces and orders the
pod's addresses, and everything else is read here. Called in a thread inside the namespace.

Not carried to the guest: routes of other tables than main and routing rules, all but the first hop
of a multipath route, preferred source addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyroute2 import IPRoute

from network.errors import TapError
from network.result import Result
from network.spec import Interface, Route

_IFF_UP, _IFF_LOOPBACK = 1, 8  # netdevice(7)
_ETHERNET = 1  # ARPHRD_ETHER
_LINK_LOCAL = ipaddress.IPv6Network("fe80::/10")  # every NIC makes its own
_TABLE_MAIN = 254  # rtnetlink(7)
_UNICAST = 1
_ON_LINK = 4  # RTNH_F_ONLINK

Links = Mapping[str, Any]  # of the kernel's messages, by interface name


@contextlib.contextmanager
def open_netlink() -> Iterator[Any]:
    """rtnetlink of the thread's namespace.

    With a plain event loop of its own: pyroute2 does not run on uvloop, which may be the policy.
    """
    loop = asyncio.SelectorEventLoop()
    try:
        with IPRoute(use_event_loop=loop) as netlink:
            yield netlink
    finally:
        loop.close()


def list_links(netlink: Any) -> Links:
    return {link.get_attr("IFLA_IFNAME"): link for link in netlink.get_links()}


def read_links(netlink: Any, links: Links, result: Result) -> tuple[tuple[Interface, ...], tuple[Route, ...]]:
    """The pod's interfaces in the result's order, each with the tap that it is to have; their routes.

    Raises TapError when an interface of the result is not there or cannot be carried by a tap.
    """
    names = find_names(result, links)
    indexes = {int(links[name]["index"]): name for name in names}
    addresses = [each for each in netlink.get_addr() if each["index"] in indexes]
    routes = [
        _route(each, indexes)
        for each in netlink.get_routes(table=_TABLE_MAIN)
        if each["type"] == _UNICAST and _hop(each)[0] in indexes
    ]
    cidrs: dict[str, list[str]] = {name: [] for name in names}
    for each in addresses:
        # of a point-to-point address IFA_ADDRESS is the peer's
        address = each.get_attr("IFA_LOCAL") or each.get_attr("IFA_ADDRESS")
        cidrs[indexes[each["index"]]].append(f"{address}/{each['prefixlen']}")
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


def find_names(result: Result, links: Links) -> list[str]:
    """Interfaces that are the pod's: those the result puts into a sandbox, else every one that is up."""
    named = [each.name for each in result.interfaces or () if each.sandbox]
    if not named:
        named = [
            name for name, link in links.items() if link["ifi_type"] == _ETHERNET and link["flags"] & _IFF_UP
        ]
    for name in named:
        if name not in links:
            raise TapError(name, "find", "the CNI result names it, and it is not in the namespace")
    names = [name for name in dict.fromkeys(named) if not links[name]["flags"] & _IFF_LOOPBACK]
    for name in names:
        if links[name]["ifi_type"] != _ETHERNET:
            raise TapError(name, "find", "it does not carry Ethernet frames, so no VM can have it")
    if not names:
        raise TapError("(none)", "find", "the CNI plug-ins made no interface in the namespace")
    return names


def guest_addresses(cidrs: Sequence[str], name: str, routes: Sequence[Route]) -> tuple[str, ...]:
    """Addresses as the guest is to set them.

    A kernel makes a route to an address's network by itself. Where a plug-in took that route away
    again (ptp does: all goes through the gateway), the guest gets the address alone, as a host's.
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
    """Routes that the guest's kernel does not make by itself, those to gateways first."""
    automatic = {
        (str(ipaddress.ip_interface(cidr).network), nic.name) for nic in interfaces for cidr in nic.addresses
    }
    kept = [
        each
        for each in routes
        if each.gateway or ((each.destination, each.interface) not in automatic and not _is_link_local(each))
    ]
    return tuple(sorted(kept, key=lambda route: bool(route.gateway)))


def _is_link_local(route: Route) -> bool:
    network = ipaddress.ip_network(route.destination)
    return isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_LINK_LOCAL)


def _hop(message: Any) -> tuple[int | None, str, int]:
    """Interface, gateway and flags of a route's only or first hop."""
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
