"""The files that make a container a member of its pod: hosts, hostname, resolv.conf."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox.errors import InvalidSpec
from sandbox.records import PodRecord
from sandbox.spec import Dns, Value

HOST_RESOLV_CONF = Path("/etc/resolv.conf")
HOST_HOSTS = Path("/etc/hosts")


class PodFiles(Value, frozen=True, kw_only=True):
    hosts: bytes
    hostname: bytes
    resolv_conf: bytes


def pod_files(record: PodRecord) -> PodFiles:
    """As every container of the pod sees them, unless a mount covers the path."""
    hostname = pod_hostname(record)
    ips = record.network.ips if record.network else ()
    shared = record.spec.host_network and HOST_HOSTS.exists()
    return PodFiles(
        hosts=HOST_HOSTS.read_bytes() if shared else hosts(hostname, ips),
        hostname=f"{hostname}\n".encode(),
        resolv_conf=resolv_conf(record.spec.dns),
    )


def pod_hostname(record: PodRecord) -> str:
    # hostname(7): 64 bytes; a client that names none gets one that can be found again
    return record.spec.hostname or (os.uname().nodename if record.spec.host_network else record.id[:12])


def hosts(hostname: str, ips: tuple[str, ...]) -> bytes:
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines += [f"{ip}\t{hostname}" for ip in ips]
    return ("\n".join(lines) + "\n").encode()


def resolv_conf(dns: Dns) -> bytes:
    """An empty DNS configuration means the host's own file (CRI, PodSandboxConfig.dns_config)."""
    if not (dns.servers or dns.searches or dns.options):
        return HOST_RESOLV_CONF.read_bytes() if HOST_RESOLV_CONF.exists() else b""
    for field in ("servers", "searches", "options"):
        for value in getattr(dns, field):
            if not value or any(each.isspace() or not each.isprintable() for each in value):
                raise InvalidSpec(f"config.dns_config.{field}", f"{value!r} is malformed", "one word")
    lines = []
    if dns.searches:
        lines.append("search " + " ".join(dns.searches))
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return ("\n".join(lines) + "\n").encode()
