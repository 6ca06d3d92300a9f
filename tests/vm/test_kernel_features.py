"""What a guest's kernel offers to containers, with modules on demand: the list of docs/guest-kernel.md."""

from __future__ import annotations

import json
import os
from pathlib import Path

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit import programs
from tests.kit.cri import Cri, Pod
from tests.kit.kernel_features import FEATURES, PRELUDE
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

TOOLS = f"{HOST}/husk/network-tools:1"
BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")


def is_small() -> bool:
    """Whether the guest has the small kernel (`husk guest build --kernel-source`)."""
    facts = Path(os.environ.get("HUSK_TEST_GUEST", ""), "current/image.json")
    return facts.exists() and json.loads(facts.read_bytes())["kernel_version"].endswith("-husk")


def documented() -> dict[str, bool]:
    """Return which features docs/guest-kernel.md says that the kernel has."""
    page = (Path(__file__).parents[2] / "docs/guest-kernel.md").read_text()
    table = page.partition("| feature |")[2].partition("\n\n")[0]
    rows = ([cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()[2:])
    return {name: (small if is_small() else debian) == "yes" for name, debian, small in rows}


DOCUMENTED = documented()


@pytest.fixture(scope="module")
def pod(site: Site, cri: Cri) -> Pod:
    site.registry.push("husk/network-tools", "1", programs.network_tools())
    cri.pull(TOOLS)
    security = api.LinuxSandboxSecurityContext(privileged=True)
    linux = api.LinuxPodSandboxConfig(
        security_context=security,
        cgroup_parent=cri.cgroup_parent,
        sysctls={"net.bridge.bridge-nf-call-iptables": "0", "net.netfilter.nf_conntrack_max": "5000"},
    )
    return cri.run_pod("features", linux=linux)


@pytest.fixture(scope="module")
def container(cri: Cri, pod: Pod) -> str:
    security = api.LinuxContainerSecurityContext(privileged=True)
    return cri.run(pod, TOOLS, SLEEP, linux=api.LinuxContainerConfig(security_context=security))


def modules(cri: Cri, container: str) -> set[str]:
    return {line.split()[0] for line in cri.exec(container, "cat", "/proc/modules").stdout.splitlines()}


def test_pod_sysctl_loads_the_module_that_it_belongs_to(cri: Cri, container: str) -> None:
    script = "cat /proc/sys/net/bridge/bridge-nf-call-iptables /proc/sys/net/netfilter/nf_conntrack_max"
    assert cri.exec(container, "sh", "-c", script).stdout == "0\n5000\n"


@pytest.mark.parametrize("name", FEATURES)
def test_feature_is_there_when_it_is_used(cri: Cri, container: str, name: str) -> None:
    result = cri.exec(container, "unshare", "-n", "sh", "-c", PRELUDE + FEATURES[name], timeout=60)
    assert (result.code == 0) is DOCUMENTED[name], result


@pytest.mark.skipif(is_small(), reason="it has no modules")
def test_unprivileged_container_loads_a_protocol_and_no_rules(cri: Cri, pod: Pod) -> None:
    """As on a node: to make a socket causes its module to be loaded."""
    container = cri.run(pod, TOOLS, SLEEP)
    result = cri.exec(container, "family", "2", "1", "132")
    assert (result.code, result.stdout) == (0, "made\n")
    assert cri.exec(container, "iptables-legacy", "-t", "nat", "-A", "INPUT", "-j", "ACCEPT").code != 0


@pytest.mark.skipif(is_small(), reason="it has no modules")
def test_container_without_rights_loads_nothing_and_one_with_net_admin_the_tables(cri: Cri) -> None:
    pod = cri.run_pod("modules")
    plain = cri.run(pod, TOOLS, SLEEP)
    before = modules(cri, plain)
    assert not before & {"ip_tables", "nf_conntrack", "nf_tables", "bridge", "loop", "tun"}
    capabilities = api.Capability(add_capabilities=["NET_ADMIN"])
    security = api.LinuxContainerSecurityContext(capabilities=capabilities)
    admin = cri.run(pod, TOOLS, SLEEP, linux=api.LinuxContainerConfig(security_context=security))
    assert {"ip_tables", "ip6_tables", "nf_conntrack"} <= modules(cri, plain)
    redirect = "iptables-legacy -t nat -A OUTPUT -p tcp --dport 81 -j REDIRECT --to-ports 15001"
    result = cri.exec(admin, "sh", "-c", redirect)  # as a service mesh's init container
    assert result.code == 0, result


def test_sysctl_of_no_module_is_refused_by_name(cri: Cri) -> None:
    linux = api.LinuxPodSandboxConfig(cgroup_parent=cri.cgroup_parent, sysctls={"net.netfilter.none": "1"})
    with pytest.raises(grpc.RpcError) as fault:
        cri.run_pod("sysctl", linux=linux)
    assert "net/netfilter/none" in str(fault.value.details())


def test_modules_are_read_only_and_hidden_from_containers(cri: Cri, container: str) -> None:
    script = "grep -c husk/rootfs/modules /proc/self/mountinfo; ls /lib/modules 2>&1"
    assert cri.exec(container, "sh", "-c", script).stdout.startswith("0\n")


def test_documented_features_are_those_tested() -> None:
    assert sorted(DOCUMENTED) == sorted(FEATURES)
