"""What a runtime tells CNI plug-ins of a pod: capability arguments and CNI_ARGS.

Names and shapes are those of the CNI conventions ("Dynamic Plugin specific fields") and of what
Kubernetes' plug-ins expect of a runtime. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

import msgspec

from network.errors import Unsatisfiable
from network.spec import NetworkRequest, PortMapping

# Bits that may pass at once; the bandwidth plug-in wants a burst with each rate and takes no more.
_MAX_BURST = 2**31 - 1
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_FACTORS = {"": Decimal(1), "m": Decimal("0.001")}
_FACTORS |= {unit: Decimal(1000) ** power for power, unit in enumerate("kMGTP", 1)}
_FACTORS |= {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTP", 1)}
_MIN_RATE, _MAX_RATE = 1000, 10**15  # what Kubernetes documents for the annotations


def cni_args(wish: NetworkRequest) -> str:
    """The value of CNI_ARGS. Raises Unsatisfiable for a name that would end its own entry."""
    values = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": wish.namespace,
        "K8S_POD_NAME": wish.name,
        "K8S_POD_INFRA_CONTAINER_ID": wish.pod_id,
        "K8S_POD_UID": wish.uid,
    }
    for name, value in values.items():
        if any(character in value for character in ";=\n\0"):
            raise Unsatisfiable(name, f"{value!r} has a character that CNI_ARGS cannot carry")
    return ";".join(f"{name}={value}" for name, value in values.items())


def capability_args(wish: NetworkRequest, pod_cidrs: tuple[str, ...]) -> dict[str, msgspec.Raw]:
    """Every capability that this pod gives a reason for; a plug-in gets those that it declares."""
    values: dict[str, object] = {}
    if ports := [_port(mapping) for mapping in wish.port_mappings if mapping.host_port]:
        values["portMappings"] = ports
    if bandwidth := _bandwidth(wish.annotations):
        values["bandwidth"] = bandwidth
    if wish.cgroup_path:
        values["cgroupPath"] = wish.cgroup_path
    if wish.annotations:
        values["io.kubernetes.cri.pod-annotations"] = dict(wish.annotations)
    if wish.dns.servers or wish.dns.searches or wish.dns.options:
        dns = {"servers": wish.dns.servers, "searches": wish.dns.searches, "options": wish.dns.options}
        values["dns"] = dns
    if pod_cidrs:
        values["ipRanges"] = [[{"subnet": cidr}] for cidr in pod_cidrs]
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in values.items()}


class _Port(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    host_port: int = msgspec.field(name="hostPort")
    container_port: int = msgspec.field(name="containerPort")
    protocol: str
    host_ip: str = msgspec.field(default="", name="hostIP")


def _port(mapping: PortMapping) -> _Port:
    return _Port(
        host_port=mapping.host_port,
        container_port=mapping.container_port,
        protocol=mapping.protocol.lower(),
        host_ip=mapping.host_ip,
    )


def _bandwidth(annotations: Mapping[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for direction in ("ingress", "egress"):
        annotation = f"kubernetes.io/{direction}-bandwidth"
        if annotation in annotations:
            found[f"{direction}Rate"] = _bits_per_second(annotation, annotations[annotation])
            found[f"{direction}Burst"] = _MAX_BURST
    return found


def _bits_per_second(annotation: str, text: str) -> int:
    """A Kubernetes quantity. Raises Unsatisfiable."""
    match = _QUANTITY.fullmatch(text)
    rate = int(Decimal(match[1]) * _FACTORS[match[2] or ""]) if match else 0
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise Unsatisfiable(f"annotation {annotation}", f"{text!r} is not a rate between 1k and 1P")
    return rate
