"""What pods hold of the network, read from the host: for `husk ps`. Changes nothing.

namespaces   <netns_dir>/<pod id>, and the interfaces in each
attachments  <cache_dir>/<pod id>.json, see `attachment_cache`
leases       <dataDir>/<network>/<address> of the IPAM plug-in host-local: the first line is the pod's id
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from network import netns
from network.attachment_cache import AttachmentCache, CacheUnreadable
from network.conf import NetworkConf, find_conf
from network.errors import NetnsError, NetworkNotReady

LEASES = "/var/lib/cni/networks"  # host-local's default


class HeldNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """The network of one pod."""

    pod_id: str
    netns: str = ""  # path; empty: it has none
    interfaces: tuple[str, ...] = ()  # in the namespace, without the loopback
    cache: str = ""  # path of the attachment's file; empty: it has none
    addresses: tuple[str, ...] = ()  # by the attachment's file
    problem: str = ""  # what could not be read


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """An address that host-local has reserved."""

    path: str
    pod_id: str


class _Ipam(msgspec.Struct):
    type: str = ""
    dataDir: str = LEASES


class _PluginIpam(msgspec.Struct):
    ipam: _Ipam | None = None


def held_networks(cache_dir: Path, netns_dir: Path) -> Iterator[HeldNetwork]:
    """Iterate over the pods whose network holds anything. Enters their namespaces, in threads. Blocking."""
    cache = AttachmentCache(cache_dir)
    paths = {path.name: path for path in netns_dir.iterdir()} if netns_dir.is_dir() else {}
    for pod_id in sorted({*cache.pod_ids(), *paths}):
        problems: list[str] = []
        attachment = None
        try:
            attachment = cache.load(pod_id)
        except (CacheUnreadable, ValueError) as error:
            problems.append(str(error))
        interfaces: Sequence[str] = ()
        if pod_id in paths:
            try:
                interfaces = netns.run_in(paths[pod_id], _interfaces)
            except (NetnsError, OSError) as error:
                problems.append(str(error))
        yield HeldNetwork(
            pod_id=pod_id,
            netns=str(paths.get(pod_id, "")),
            interfaces=tuple(interfaces),
            cache=str(cache_dir / f"{pod_id}.json") if pod_id in cache.pod_ids() else "",
            addresses=attachment.attachment.ips if attachment and attachment.attachment else (),
            problem="; ".join(problems),
        )


def _interfaces() -> Sequence[str]:
    return sorted(name for _, name in socket.if_nameindex() if name != "lo")


def leases(conf_dir: Path, cache_dir: Path) -> Iterator[Lease]:
    """Iterate over host-local's leases in the networks that are configured or that pods are attached to."""
    for directory in sorted(_lease_directories(conf_dir, cache_dir)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in sorted(directory.iterdir()):
                if _is_address(path.name):
                    first = path.read_text(errors="replace").partition("\n")[0].strip()
                    yield Lease(path=str(path), pod_id=first)


def _lease_directories(conf_dir: Path, cache_dir: Path) -> set[Path]:
    confs: dict[str, NetworkConf] = {}
    with contextlib.suppress(NetworkNotReady):
        confs["configured"] = find_conf(conf_dir)
    cache = AttachmentCache(cache_dir)
    for pod_id in cache.pod_ids():
        with contextlib.suppress(CacheUnreadable, ValueError):
            if attachment := cache.load(pod_id):
                confs[pod_id] = attachment.conf
    return {Path(directory, conf.name) for conf in confs.values() for directory in _data_dirs(conf)}


def _data_dirs(conf: NetworkConf) -> Iterator[str]:
    for plugin in conf.plugins:
        with contextlib.suppress(msgspec.MsgspecError):
            ipam = msgspec.json.decode(plugin.json, type=_PluginIpam).ipam
            if ipam is not None and ipam.type == "host-local":
                yield ipam.dataDir


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
