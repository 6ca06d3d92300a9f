"""What a runtime passes to CNI plug-ins about a pod: capability arguments and CNI_ARGS.

Names and shapes are those of the CNI conventions ("Dynamic Plugin specific fields") and of what the plug-ins
for Kubernetes expect of a runtime. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

import msgspec

from network.errors import Unsatisfiable
from network.spec import NetworkRequest, PublishedPort

# Bits of a burst. The bandwidth plug-in requires one with each rate, and accepts no larger number.
_MAX_BURST = 2**31 - 1
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_FACTORS = {"": Decimal(1), "m": Decimal("0.001")}
_FACTORS |= {unit: Decimal(1000) ** power for power, unit in enumerate("kMGTP", 1)}
_FACTORS |= {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTP", 1)}
_MIN_RATE, _MAX_RATE = 1000, 10**15  # the range that Kubernetes documents for the annotations


def cni_args(request: NetworkRequest) -> str:
    """Compose CNI_ARGS. Raises Unsatisfiable for a name with a separator (";", "=", newline) or a NUL."""
    values = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": request.namespace,
        "K8S_POD_NAME": request.name,
        "K8S_POD_INFRA_CONTAINER_ID": request.pod_id,
        "K8S_POD_UID": request.uid,
    }
    for name, value in values.items():
        if any(character in value for character in ";=\n\0"):
            raise Unsatisfiable(name, f"{value!r} has a character that CNI_ARGS cannot carry")
    return ";".join(f"{name}={value}" for name, value in values.items())


def capability_args(request: NetworkRequest, pod_cidrs: tuple[str, ...]) -> dict[str, msgspec.Raw]:
    """Compose the capability arguments that apply to this pod; each plug-in gets those that it declares.

    Raises Unsatisfiable for a bandwidth annotation that is not a rate.
    """
    values: dict[str, object] = {}
    if ports := [_port(each) for each in request.ports if each.host_port]:
        values["portMappings"] = ports
    if bandwidth := _bandwidth(request.annotations):
        values["bandwidth"] = bandwidth
    if request.cgroup_path:
        values["cgroupPath"] = request.cgroup_path
    if request.annotations:
        values["io.kubernetes.cri.pod-annotations"] = dict(request.annotations)
    if request.dns.servers or request.dns.searches or request.dns.options:
        dns = {
            "servers": request.dns.servers,
            "searches": request.dns.searches,
            "options": request.dns.options,
        }
        values["dns"] = dns
    if pod_cidrs:
        values["ipRanges"] = [[{"subnet": cidr}] for cidr in pod_cidrs]
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in values.items()}


class _Port(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    host_port: int = msgspec.field(name="hostPort")
    container_port: int = msgspec.field(name="containerPort")
    protocol: str
    host_ip: str = msgspec.field(default="", name="hostIP")


def _port(port: PublishedPort) -> _Port:
    return _Port(
        host_port=port.host_port,
        container_port=port.container_port,
        protocol=port.protocol.lower(),
        host_ip=port.host_ip,
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
    """Parse a Kubernetes quantity in bits per second. Raises Unsatisfiable."""
    match = _QUANTITY.fullmatch(text)
    rate = int(Decimal(match[1]) * _FACTORS[match[2] or ""]) if match else 0
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise Unsatisfiable(f"annotation {annotation}", f"{text!r} is not a rate between 1k and 1P")
    return rate
