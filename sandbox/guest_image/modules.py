"""The kernel modules that a guest loads on demand: those of the kernel's package that need no hardware.

    modules/aliases    NAME FILE...: what to load, in this order, when the kernel requests NAME
    modules/kernel/    the modules, decompressed, at their places in the kernel's package

The guest sees this directory read-only, by virtio-fs, so that neither its start nor its memory depends on how
many modules there are. NAME is a module's name or alias, or one of ours, for what the kernel of a node has
loaded without a request: "sysctl:DIRECTORY" or "sysctl:FILE" below /proc/sys, "capability:NAME". Names count
dashes and underscores as equal (modprobe(8)); one with "*" is a pattern (fnmatch(3)).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from sandbox.guest_image.vmlinux import (
    BadKernel,
    cut_signature,
    decompress,
    find_aliases,
    find_dependencies,
)

# Folders of the kernel's tree, with all that lies below them.
TREES = (
    "arch/x86/crypto",
    "block",
    "crypto",
    "drivers/block",
    "drivers/md",
    "drivers/net/bonding",
    "drivers/net/ipvlan",
    "drivers/net/ovpn",
    "drivers/net/ppp",
    "drivers/net/slip",
    "drivers/net/team",
    "drivers/net/vxlan",
    "drivers/net/wireguard",
    "fs",
    "lib",
    "net",
)
# Modules that cannot work in a guest of QEMU: virtual sockets of other hypervisors.
FOREIGN = ("hv_sock", "vmw_vsock_vmci_transport")
# Folders whose own files count alone: below this one are the drivers of network adapters.
FOLDERS = ("drivers/net",)

# What is not requested before it is there, and what a node's kernel has loaded (for kube-proxy, a CNI
# plug-in, systemd): the files of /proc/sys appear with the module; iptables finds its tables by a socket
# option, which the module adds.
REQUESTS: Mapping[str, tuple[str, ...]] = {
    "sysctl:net/netfilter": ("nf_conntrack",),
    "sysctl:net/nf_conntrack_max": ("nf_conntrack",),
    "sysctl:net/bridge": ("br_netfilter",),
    "sysctl:net/ipv4/vs": ("ip_vs",),
    "sysctl:net/sctp": ("sctp",),
    "sysctl:net/mpls": ("mpls_router",),
    "capability:net_admin": ("ip_tables", "ip6_tables", "nf_conntrack"),
}
# Loaded after a module, as nothing requests them: the loopback is one of the transports of virtual sockets.
COMPANIONS: Mapping[str, tuple[str, ...]] = {"vsock": ("vsock_loopback",)}

# Patterns of aliases that the kernel requests; all others match hardware, of which udev would hear.
_PATTERN = re.compile(r"(block|char)-major-[-\d*]+")
_DEVICE = re.compile(rb"\0alias=devname:([^\0]+)")
_NUMBER = re.compile(rb"\0alias=char-major-(\d+)-(\d+)\0")


class Device(msgspec.Struct, frozen=True):
    """A character device whose driver is loaded when its node is opened, as by `kmod static-nodes`."""

    name: str  # below /dev
    major: int
    minor: int


class ModuleStore(msgspec.Struct, frozen=True):
    """The content of the directory: by path, and the devices, whose nodes the guest makes at its start."""

    files: Mapping[str, bytes]
    devices: tuple[Device, ...]


def make_store(
    modules: Path, available: Mapping[str, Path], present: Iterable[str], *, keep_signatures: bool
) -> ModuleStore:
    """Collect the modules of a kernel, from /lib/modules/VERSION, and what they depend on.

    `present` are modules that are built in or loaded at the start. A module whose dependencies the package
    does not have is left out. Raises BadKernel for one that cannot be decompressed.
    """
    inside = set(present)
    contents: dict[str, bytes] = {}
    wanted = [
        name
        for name, path in available.items()
        if name not in FOREIGN and _is_wanted(path.relative_to(modules / "kernel"))
    ]
    while wanted:
        name = wanted.pop()
        if name in contents or name in inside or name not in available:
            continue
        content = decompress(available[name].read_bytes(), f"module {name}")
        contents[name] = content if keep_signatures else cut_signature(content)
        wanted += find_dependencies(content)
    orders = _orders(contents, inside)
    places = {name: str(available[name].relative_to(modules)).split(".ko")[0] + ".ko" for name in orders}
    lines = {
        alias: " ".join((alias, *(places[each] for each in order)))
        for alias, order in _requests(contents, orders).items()
    }
    files = {places[name]: contents[name] for name in sorted(orders)}
    files["aliases"] = "".join(f"{lines[alias]}\n" for alias in sorted(lines)).encode()
    devices = {device for name in orders for device in _devices(contents[name])}
    return ModuleStore(files, tuple(sorted(devices, key=lambda device: device.name)))


def _is_wanted(path: Path) -> bool:
    folder = str(path.parent)
    return folder in FOLDERS or any(folder == tree or folder.startswith(f"{tree}/") for tree in TREES)


def _orders(contents: Mapping[str, bytes], inside: set[str]) -> dict[str, list[str]]:
    """Return what to load for each module, dependencies first; modules whose dependencies are missing are
    left out.
    """
    orders: dict[str, list[str]] = {}

    def order(name: str) -> list[str]:
        if name not in orders:
            if name not in contents:
                raise BadKernel(f"module {name}", "is not in the kernel's package")
            needs = [each for each in find_dependencies(contents[name]) if each not in inside]
            orders[name] = list(dict.fromkeys([*(each for need in needs for each in order(need)), name]))
        return orders[name]

    for name in sorted(contents):
        try:
            order(name)
        except BadKernel:
            continue
    return orders


def _requests(contents: Mapping[str, bytes], orders: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return what to load for each name by which something is requested."""
    found: dict[str, list[str]] = {}
    for name, order in orders.items():
        after = [each for each in COMPANIONS.get(name, ()) if each in orders]
        whole = list(dict.fromkeys([*order, *(each for more in after for each in orders[more])]))
        for alias in (name, *find_aliases(contents[name]), *_patterns(contents[name])):
            # several modules may have one alias (transports of a protocol): modprobe(8) loads all of them
            found[alias] = list(dict.fromkeys([*found.get(alias, ()), *whole]))
    for request, names in REQUESTS.items():
        known = [name for name in names if name in orders]
        if known:
            found[request] = list(dict.fromkeys(each for name in known for each in orders[name]))
    return found


def _patterns(module: bytes) -> list[str]:
    names = (each.decode() for each in re.findall(rb"\0alias=([^\0]+)", module))
    return [name for name in names if "*" in name and _PATTERN.fullmatch(name)]


def _devices(module: bytes) -> list[Device]:
    name, number = _DEVICE.search(module), _NUMBER.search(module)
    if name is None or number is None:
        return []
    return [Device(name[1].decode(), int(number[1]), int(number[2]))]
