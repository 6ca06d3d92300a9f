"""The values of this package: what a pod wants of the network, and what it got. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class PortMapping(msgspec.Struct, frozen=True, kw_only=True):
    """One published port, as the CNI `portMappings` capability takes it."""

    protocol: str  # tcp, udp or sctp
    container_port: int
    host_port: int
    host_ip: str = ""


class Dns(msgspec.Struct, frozen=True, kw_only=True):
    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class NetworkRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a pod wants; the K8S_POD_* CNI_ARGS are made of the names."""

    pod_id: str
    name: str
    namespace: str
    uid: str
    port_mappings: tuple[PortMapping, ...] = ()
    cgroup_path: str = ""  # for the cgroupPath capability
    annotations: Mapping[str, str] = {}  # the pod's; kubernetes.io/{ingress,egress}-bandwidth count here
    dns: Dns = Dns()  # for the dns capability


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC of the guest: what the CNI plug-ins made, and the tap that carries it."""

    name: str
    tap: str
    mac: str
    mtu: int
    addresses: tuple[str, ...] = ()  # CIDR


class Route(msgspec.Struct, frozen=True, kw_only=True):
    destination: str  # CIDR
    gateway: str = ""
    interface: str
    metric: int = 0
    mtu: int = 0
    on_link: bool = False


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """A network that is up. Kept in the pod's record."""

    netns: str  # path
    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    ips: tuple[str, ...] = ()  # of the first interface, as the plug-ins ordered them
    dns_servers: tuple[str, ...] = ()
    dns_searches: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()


class NetworkStatus(msgspec.Struct, frozen=True, kw_only=True):
    ready: bool
    reason: str = ""  # CamelCase word, as a Kubernetes condition has it
    message: str = ""
