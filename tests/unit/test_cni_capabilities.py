"""What plug-ins are told of a pod."""

from __future__ import annotations

import json
from typing import Any

import pytest

from network.capabilities import capability_args, cni_args
from network.errors import Unsatisfiable
from network.spec import Dns, NetworkRequest, PortMapping


def wish(**fields: Any) -> NetworkRequest:
    base: dict[str, Any] = {"pod_id": "p1", "name": "web", "namespace": "default", "uid": "u-1"}
    return NetworkRequest(**{**base, **fields})


def values(cidrs: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {name: json.loads(bytes(raw)) for name, raw in capability_args(wish(**fields), cidrs).items()}


def test_arguments_name_the_pod() -> None:
    assert cni_args(wish()) == (
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=p1;K8S_POD_UID=u-1"
    )


@pytest.mark.parametrize("name", ["a;b", "a=b", "a\nb"])
def test_a_name_cannot_add_arguments(name: str) -> None:
    with pytest.raises(Unsatisfiable, match="K8S_POD_NAME"):
        cni_args(wish(name=name))


def test_a_plain_pod_has_no_capabilities() -> None:
    assert values() == {}


def test_ports_in_the_plugins_words() -> None:
    ports = (
        PortMapping(protocol="TCP", container_port=80, host_port=8080),
        PortMapping(protocol="udp", container_port=53, host_port=5353, host_ip="127.0.0.1"),
        PortMapping(protocol="tcp", container_port=9, host_port=0),
    )
    assert values(port_mappings=ports)["portMappings"] == [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
    ]


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10M", 10_000_000), ("1k", 1000), ("1.5Mi", 1_572_864), ("4000", 4000), ("1P", 10**15)],
)
def test_bandwidth_is_a_quantity(text: str, rate: int) -> None:
    told = values(annotations={"kubernetes.io/ingress-bandwidth": text})["bandwidth"]
    assert told == {"ingressRate": rate, "ingressBurst": 2**31 - 1}


@pytest.mark.parametrize("text", ["", "fast", "1", "2P", "-5M", "1e9"])
def test_a_senseless_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(Unsatisfiable, match="egress-bandwidth"):
        values(annotations={"kubernetes.io/egress-bandwidth": text})


def test_the_rest() -> None:
    told = values(
        cidrs=("10.1.0.0/16", "fd00::/64"),
        cgroup_path="/kubepods/x",
        annotations={"a": "b"},
        dns=Dns(servers=("10.0.0.10",), searches=("s",)),
    )
    assert told == {
        "cgroupPath": "/kubepods/x",
        "io.kubernetes.cri.pod-annotations": {"a": "b"},
        "dns": {"servers": ["10.0.0.10"], "searches": ["s"], "options": []},
        "ipRanges": [[{"subnet": "10.1.0.0/16"}], [{"subnet": "fd00::/64"}]],
    }
