"""A pod's identity, sysctls and network: what is configured once in its VM, in two parts.

The identity is known at once, the network when CNI has answered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from network.spec import Attachment
from sandbox.errors import InvalidSpec
from sandbox.plan.paths import checked
from sandbox.plan.values import IdentityPlan, InterfacePlan, NetworkPlan, RoutePlan, Sysctl
from sandbox.spec import PodSpec

MAX_HOSTNAME = 64  # HOST_NAME_MAX
_MAX_VALUE_BYTES = 4095  # the kernel reads one page
_FIELD = "config.linux.sysctls"

# By default containers have no capabilities over their pod's network; these let an unprivileged user
# listen on port 80 and ping. containerd and Docker set the same.
_DEFAULT_SYSCTLS = (
    Sysctl(path="net/ipv4/ip_unprivileged_port_start", value="0"),
    Sysctl(path="net/ipv4/ping_group_range", value="0 2147483647"),
)
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*", re.ASCII)


def compile_identity(pod: PodSpec, *, entropy: bytes, machine_id: str, wall_ns: int) -> IdentityPlan:
    """Return what distinguishes the VM from every other copy of its template. Raises InvalidSpec.

    `entropy` is for the kernel's pool, `wall_ns` the host's CLOCK_REALTIME.
    """
    return IdentityPlan(
        # without a hostname, what /etc/hostname says of the pod (see `pod_files`)
        hostname=_hostname(pod.hostname) or machine_id[:12],
        entropy=entropy,
        machine_id=machine_id,
        wall_ns=wall_ns,
    )


def compile_network(pod: PodSpec, network: Attachment | None, *, first_mac: str) -> NetworkPlan:
    """Return the network of the guest and the pod's sysctls, some of which belong to an interface.

    Without `network` the pod has only its loopback. `first_mac` is the address with which the VM's first
    NIC was started. Every sysctl that is spelled like one is accepted: the kernel is the pod's own, so
    none can affect another pod. Raises InvalidSpec with the field.
    """
    interfaces = network.interfaces if network else ()
    routes = network.routes if network else ()
    return NetworkPlan(
        sysctls=compile_sysctls(pod.sysctls),
        interfaces=tuple(
            InterfacePlan(
                mac=nic.mac,
                name=nic.name,
                mtu=nic.mtu,
                addresses=tuple(nic.addresses),
                found_mac="" if number else first_mac,
            )
            for number, nic in enumerate(interfaces)
        ),
        routes=tuple(
            RoutePlan(
                destination=route.destination,
                gateway=route.gateway,
                interface=route.interface,
                metric=route.metric,
                mtu=route.mtu,
                on_link=route.on_link,
            )
            for route in routes
        ),
    )


def _hostname(name: str) -> str:
    checked(name, "config.hostname")
    if len(name.encode()) > MAX_HOSTNAME or any(each.isspace() or each == "/" for each in name):
        raise InvalidSpec(
            "config.hostname", f"{name!r} is not a valid hostname", f"at most {MAX_HOSTNAME} bytes"
        )
    return name


def compile_sysctls(requested: Mapping[str, str], *, defaults: bool = True) -> tuple[Sysctl, ...]:
    """Return the sysctls to write, in order: with `defaults`, ours first that the request does not name.

    Raises InvalidSpec for a name that is not a sysctl's, or a value that is not one line of a page.
    """
    given = tuple(
        Sysctl(path=sysctl_path(name), value=_checked_value(name, value)) for name, value in requested.items()
    )
    named = {sysctl.path for sysctl in given}
    return (*(each for each in _DEFAULT_SYSCTLS if defaults and each.path not in named), *given)


def _checked_value(name: str, value: str) -> str:
    if "\0" in value or "\n" in value or len(value.encode("utf-8", "replace")) > _MAX_VALUE_BYTES:
        raise InvalidSpec(f"{_FIELD}[{name!r}]", "the value is malformed", "one line of at most one page")
    return checked(value, f"{_FIELD}[{name!r}]")


def sysctl_path(name: str) -> str:
    """Return the sysctl's file, relative to /proc/sys. Raises InvalidSpec.

    The first separator in a name is the separator, and the other sign is then an ordinary one
    (sysctl(8): net.ipv4.conf.eth0/1.forwarding is interface eth0.1).
    """
    dot, slash = name.find("."), name.find("/")
    path = name if slash >= 0 and (dot < 0 or slash < dot) else name.translate(str.maketrans("./", "/."))
    parts = path.split("/")
    if len(parts) < 2 or len(name) > 512 or not all(_COMPONENT.fullmatch(part) for part in parts):
        raise InvalidSpec(f"{_FIELD}[{name!r}]", "is not the name of a sysctl", "such as net.core.somaxconn")
    return path
