"""The files that make a container a member of its pod: hosts, hostname, resolv.conf. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.errors import InvalidSpec
from sandbox.spec import Dns, PodSpec, Value

SHORT_ID = 12  # characters; what a pod without a hostname is called


class NodeFiles(Value, frozen=True, kw_only=True):
    """What pods may be given of the node (see `steps.node_files`)."""

    nodename: str  # uname(2)
    hosts: bytes | None  # of /etc/hosts; None: there is none
    resolv_conf: bytes  # of /etc/resolv.conf; empty: there is none


class PodFiles(Value, frozen=True, kw_only=True):
    """Contents of /etc/hosts, /etc/hostname and /etc/resolv.conf."""

    hosts: bytes
    hostname: bytes
    resolv_conf: bytes


def pod_files(spec: PodSpec, node: NodeFiles, *, pod_id: str, ips: Sequence[str]) -> PodFiles:
    """Return the files as every container of the pod sees them, unless a mount covers the path.

    With the node's network the pod has the node's /etc/hosts. Raises InvalidSpec with the field.
    """
    hostname = pod_hostname(spec, pod_id, node.nodename)
    own = node.hosts if spec.host_network else None
    return PodFiles(
        hosts=hosts(hostname, ips) if own is None else own,
        hostname=f"{hostname}\n".encode(),
        resolv_conf=resolv_conf(spec.dns, node.resolv_conf),
    )


def pod_hostname(spec: PodSpec, pod_id: str, nodename: str) -> str:
    """Return the hostname that was asked for, else the node's with its network, else the short id."""
    return spec.hostname or (nodename if spec.host_network else pod_id[:SHORT_ID])


def hosts(hostname: str, ips: Sequence[str]) -> bytes:
    """Return a hosts(5) file for the loopback addresses and for the pod's own."""
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines += [f"{ip}\t{hostname}" for ip in ips]
    return ("\n".join(lines) + "\n").encode()


def resolv_conf(dns: Dns, of_node: bytes) -> bytes:
    """Return a resolv.conf(5) file.

    An empty DNS configuration means the node's own file (CRI, PodSandboxConfig.dns_config).
    Raises InvalidSpec for an entry that is not one printable word.
    """
    if not (dns.servers or dns.searches or dns.options):
        return of_node
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
