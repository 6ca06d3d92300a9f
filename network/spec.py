"""Values of this package: what a pod requests of its network, and what it got. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

IFNAME = "eth0"  # the name that clients of Kubernetes expect of a pod's first interface


class PublishedPort(msgspec.Struct, frozen=True, kw_only=True):
    """A port of the pod that is reachable on the host, as the CNI `portMappings` capability has it."""

    protocol: str  # tcp, udp or sctp, in any case
    container_port: int
    host_port: int  # 0: not published
    host_ip: str = ""  # empty: all addresses of the host


class Dns(msgspec.Struct, frozen=True, kw_only=True):
    """Resolver settings of the pod, for the CNI `dns` capability."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class NetworkRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a pod requests. The names become the K8S_POD_* entries of CNI_ARGS."""

    pod_id: str
    name: str
    namespace: str
    uid: str
    ports: tuple[PublishedPort, ...] = ()
    cgroup_path: str = ""  # for the cgroupPath capability
    annotations: Mapping[str, str] = {}  # the pod's; kubernetes.io/{ingress,egress}-bandwidth are used
    dns: Dns = Dns()  # for the dns capability


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC of the guest: what the CNI plug-ins created, and the tap that carries its frames."""

    name: str
    tap: str
    mac: str
    mtu: int
    addresses: tuple[str, ...] = ()  # CIDR


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A route of the main table that the guest has to set."""

    destination: str  # CIDR
    gateway: str = ""
    interface: str
    metric: int = 0
    mtu: int = 0  # 0: the interface's
    on_link: bool = False  # the gateway is reachable although no route covers it (RTNH_F_ONLINK)


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """A pod's network that is up. Kept in the pod's record."""

    netns: str  # path
    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    ips: tuple[str, ...] = ()  # of the first interface, in the order of the CNI result
    dns_servers: tuple[str, ...] = ()
    dns_searches: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()


class NetworkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a pod could be attached now: the CRI's NetworkReady condition."""

    ready: bool
    reason: str = ""  # a CamelCase word, as a Kubernetes condition has it
    message: str = ""
