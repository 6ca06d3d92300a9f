"""Tap devices, and the tc redirects that carry a CNI interface's frames to them and back.

    bridge ── veth ══ eth0 ──ingress──> tap0 ── fd ── VM        all in the pod's namespace
                      eth0 <──ingress── tap0

Each side has an ingress qdisc with a u32 filter that matches everything (not every kernel has cls_matchall)
and redirects the frame to the other's egress (mirred). The namespace's network stack sees none of the frames,
so the addresses that plug-ins set on eth0 can stay, where their CHECK and DEL expect them.

A tap is not persistent: it exists while its file descriptor is open, in this process and then in the VMM. The
first interface's exists before the interface, as its VM is started meanwhile or comes from the pool. Its
qdisc goes with it; the one on the CNI interface is replaced when the tap is created again. So nothing has to
be undone that does not go with the descriptor or the namespace.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from network.errors import TapError
from network.links import Links, list_links, open_netlink
from network.spec import Interface

FIRST_TAP = "tap0"  # of the first interface, whatever that is called
_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_ETH_P_ALL = 0x0003
_INGRESS, _INGRESS_PARENT = "ffff:", 0xFFFF0000  # handle of an ingress qdisc, tc(8)
_FLOW = 0x10001  # a class id that u32 asks for; ingress qdiscs have no classes


def open_taps(interfaces: Iterable[Interface]) -> tuple[int, ...]:
    """Create a tap for each interface and connect it; called in a thread inside the namespace.

    Returns descriptors that the caller owns, non-blocking and close-on-exec, in the order of `interfaces`.
    Raises TapError; then none is left open.
    """
    taps: list[int] = []
    try:
        with open_netlink() as netlink:
            taps.extend(open_tap(interface.tap) for interface in interfaces)
            links = list_links(netlink)
            for interface in interfaces:
                join(netlink, links, interface)
    except BaseException:
        for tap in taps:
            os.close(tap)
        raise
    return tuple(taps)


def open_tap(name: str) -> int:
    """Create a tap in the thread's namespace, not connected yet. Returns a descriptor that the caller owns.

    Raises TapError, also when the tap of that name is in use.
    """
    try:
        # the device belongs to the namespace in which this file is opened
        fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise TapError(name, f"open {_TUN}", str(error)) from error
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(fd)
        busy = error.errno == errno.EBUSY
        raise TapError(
            name, "create", "a VMM of this pod still has it open" if busy else str(error)
        ) from error
    # else the namespace's stack would send the guest router solicitations and MLD reports
    ipv6 = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    if ipv6.exists():
        ipv6.write_text("1")
    return fd


def join(netlink: Any, links: Links, interface: Interface) -> None:
    """Redirect frames between an interface and its tap, both ways, and bring the tap up. Raises TapError."""
    step = "find both devices"
    try:
        tap, carrier = int(links[interface.tap]["index"]), int(links[interface.name]["index"])
        step = "redirect frames"
        _redirect(netlink, carrier, tap)
        _redirect(netlink, tap, carrier)
        step = "bring up"
        netlink.link("set", index=tap, mtu=interface.mtu, state="up")
    except KeyError as error:
        raise TapError(interface.name, step, f"{error} does not exist any more") from error
    except NetlinkError as error:
        raise TapError(interface.name, step, str(error)) from error


def _redirect(netlink: Any, source: int, target: int) -> None:
    """Redirect all frames that arrive at `source` to `target`, replacing the redirect of an earlier VM."""
    try:
        netlink.tc("add", "ingress", source, _INGRESS)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise
        netlink.tc("del", "ingress", source, _INGRESS)
        netlink.tc("add", "ingress", source, _INGRESS)
    mirred = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target}
    netlink.tc(
        "add-filter",
        "u32",
        source,
        parent=_INGRESS_PARENT,
        protocol=_ETH_P_ALL,
        prio=1,
        target=_FLOW,
        keys=["0x0/0x0+0"],
        action=mirred,
    )
