"""What plug-ins get about a pod: CNI_ARGS and capability arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest

from network.capabilities import capability_args, cni_args
from network.errors import Unsatisfiable
from network.spec import Dns, NetworkRequest, PublishedPort


def make_request(**fields: Any) -> NetworkRequest:
    base: dict[str, Any] = {"pod_id": "p1", "name": "web", "namespace": "default", "uid": "u-1"}
    return NetworkRequest(**{**base, **fields})


def values(cidrs: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {
        name: json.loads(bytes(raw)) for name, raw in capability_args(make_request(**fields), cidrs).items()
    }


def test_cni_args_name_the_pod() -> None:
    assert cni_args(make_request()) == (
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=p1;K8S_POD_UID=u-1"
    )


@pytest.mark.parametrize("name", ["a;b", "a=b", "a\nb"])
def test_name_with_a_separator_is_rejected(name: str) -> None:
    with pytest.raises(Unsatisfiable, match="K8S_POD_NAME"):
        cni_args(make_request(name=name))


def test_pod_without_requests_has_no_capability_arguments() -> None:
    assert values() == {}


def test_published_ports_have_the_names_of_portmap() -> None:
    ports = (
        PublishedPort(protocol="TCP", container_port=80, host_port=8080),
        PublishedPort(protocol="udp", container_port=53, host_port=5353, host_ip="127.0.0.1"),
        PublishedPort(protocol="tcp", container_port=9, host_port=0),
    )
    assert values(ports=ports)["portMappings"] == [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
    ]


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10M", 10_000_000), ("1k", 1000), ("1.5Mi", 1_572_864), ("4000", 4000), ("1P", 10**15)],
)
def test_bandwidth_is_parsed_as_a_quantity(text: str, rate: int) -> None:
    passed = values(annotations={"kubernetes.io/ingress-bandwidth": text})["bandwidth"]
    assert passed == {"ingressRate": rate, "ingressBurst": 2**31 - 1}


@pytest.mark.parametrize("text", ["", "fast", "1", "2P", "-5M", "1e9"])
def test_invalid_bandwidth_is_rejected(text: str) -> None:
    with pytest.raises(Unsatisfiable, match="egress-bandwidth"):
        values(annotations={"kubernetes.io/egress-bandwidth": text})


def test_other_capabilities_are_passed() -> None:
    passed = values(
        cidrs=("10.1.0.0/16", "fd00::/64"),
        cgroup_path="/kubepods/x",
        annotations={"a": "b"},
        dns=Dns(servers=("10.0.0.10",), searches=("s",)),
    )
    assert passed == {
        "cgroupPath": "/kubepods/x",
        "io.kubernetes.cri.pod-annotations": {"a": "b"},
        "dns": {"servers": ["10.0.0.10"], "searches": ["s"], "options": []},
        "ipRanges": [[{"subnet": "10.1.0.0/16"}], [{"subnet": "fd00::/64"}]],
    }
