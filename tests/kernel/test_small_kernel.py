"""The kernel of `husk guest build --kernel-source` is reproducible, and has what images need.

`tests/run kernel` builds it, runs these and all of `tests/vm` with it: two builds of a quarter of an hour
each on two cores, so `all` does not include it.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from sandbox.guest_image.kernel_source import OPTIONS, find_dropped
from tests.conftest import Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import REPOSITORY, Daemon
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.kernel

NAME = "husk/iptables"
XTABLES = "/usr/lib/x86_64-linux-gnu/xtables"
PROGRAMS = ("/usr/sbin/xtables-nft-multi", "/usr/sbin/xtables-legacy-multi")


def firewall_image() -> images.Image:
    """Return an image of busybox and this machine's iptables with the libraries that it loads."""
    layer = images.Layer()
    paths = {*PROGRAMS, *map(str, Path(XTABLES).glob("*.so"))}
    printed = subprocess.run(["ldd", *paths], check=True, capture_output=True, text=True).stdout
    paths |= set(re.findall(r"\s(/\S+\.so\S*) \(", printed))
    for path in sorted(paths):
        layer.add(path, Path(path).read_bytes(), mode=0o755)
    for family in ("iptables", "ip6tables"):
        for form in ("nft", "legacy"):
            layer.symlink(f"usr/sbin/{family}-{form}", f"xtables-{form}-multi")
    return images.Image((images.base_layer(), layer), cmd=("sh",))


@pytest.fixture(scope="module")
def firewall(site: Site, cri: Cri, pod: Pod) -> Iterator[str]:
    """A container with the capabilities to change its pod's network."""
    site.registry.push(NAME, "1", firewall_image())
    cri.pull(f"{HOST}/{NAME}:1")
    rights = api.Capability(add_capabilities=["NET_ADMIN", "NET_RAW"])
    security = api.LinuxContainerSecurityContext(capabilities=rights)
    yield cri.run(
        pod,
        f"{HOST}/{NAME}:1",
        ["sh", "-c", "mkdir -p /www && echo served >/www/index.html && exec httpd -f -p 8080 -h /www"],
        linux=api.LinuxContainerConfig(security_context=security),
    )


@pytest.fixture(scope="module")
def client(cri: Cri, pod: Pod) -> str:
    """Another container of the pod, to which its firewall rules apply too."""
    return cri.run(pod, f"{HOST}/husk/busybox:1", ["sleep", "3600"])


def output_of(cri: Cri, container: str, script: str) -> str:
    result = cri.exec(container, "sh", "-c", script)
    assert result.code == 0, f"{script}: {result}"
    return result.stdout.strip()


def test_two_builds_give_the_same_bytes(daemon: Daemon) -> None:
    root = scratch_dir("kernel")
    command = [sys.executable, "-m", "cri", "guest", "build", "--kernel-source", "--root", str(root)]
    (root / "guest").mkdir()
    (root / "guest/packages").symlink_to(daemon.root / "guest/packages")  # saves the download
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = ((place / "guest/current").resolve() for place in (root, daemon.root))
    assert ours.name == theirs.name, "named by the hash of the content"
    assert (ours / "vmlinux").read_bytes() == (theirs / "vmlinux").read_bytes()
    assert json.loads((ours / "image.json").read_bytes())["modules"] == []


def test_running_kernel_has_the_requested_options(daemon: Daemon, cri: Cri, pod: Pod, firewall: str) -> None:
    assert output_of(cri, firewall, "uname -r").endswith("-husk")
    facts: Any = json.loads((daemon.root / "guest/current/image.json").read_bytes())
    assert output_of(cri, firewall, "uname -r") == facts["kernel_version"]
    packed = output_of(cri, firewall, "base64 /proc/config.gz")
    decoded = subprocess.run(["base64", "-d"], input=packed.encode(), capture_output=True, check=True).stdout
    assert find_dropped(OPTIONS.read_text(), gzip.decompress(decoded).decode()) == ()


def test_apparmor_profile_is_rejected_with_a_reason(cri: Cri, pod: Pod) -> None:
    profile = api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault)
    security = api.LinuxContainerSecurityContext(apparmor=profile)
    container = cri.create(
        pod, f"{HOST}/husk/busybox:1", ["true"], linux=api.LinuxContainerConfig(security_context=security)
    )
    with pytest.raises(grpc.RpcError) as fault:
        cri.start(container)
    assert "husk-default: the guest's kernel has no AppArmor" in str(fault.value.details())
    cri.remove(container)


def test_containers_have_all_controllers(cri: Cri, firewall: str) -> None:
    there = output_of(cri, firewall, "cat /sys/fs/cgroup/cgroup.controllers")
    assert set(there.split()) >= {"cpuset", "cpu", "io", "memory", "hugetlb", "pids", "misc"}
    for file in ("cpu.pressure", "memory.pressure", "memory.swap.max", "cpu.max", "io.max"):
        output_of(cri, firewall, f"test -e /sys/fs/cgroup/{file}")


@pytest.mark.parametrize(
    ("command", "address", "port"),
    [
        ("iptables-nft", "127.0.0.1", 9001),
        ("iptables-legacy", "127.0.0.1", 9002),
        ("ip6tables-nft", "[::1]", 9003),
        ("ip6tables-legacy", "[::1]", 9004),
    ],
)
def test_pod_redirects_its_own_ports(
    cri: Cri, firewall: str, client: str, command: str, address: str, port: int
) -> None:
    """What the sidecar of a service mesh does: NAT by owner, with either variant of iptables."""
    match = f"-p tcp --dport {port} -m owner --uid-owner 0 -m comment --comment x"
    rule = f"OUTPUT {match} -j REDIRECT --to-ports 8080"
    get = f"wget -q -O - http://{address}:{port}/"
    assert cri.exec(client, "sh", "-c", get).code == 1
    output_of(cri, firewall, f"{command} -t nat -A {rule}")
    assert output_of(cri, client, get) == "served"
    output_of(cri, firewall, f"{command} -t nat -D {rule}")
    assert cri.exec(client, "sh", "-c", get).code == 1


@pytest.mark.parametrize(
    "rule",
    [
        "-t mangle -A PREROUTING -p tcp -m conntrack --ctstate NEW -j MARK --set-mark 1",
        "-t mangle -A PREROUTING -p tcp -m socket --transparent -j ACCEPT",
        "-t mangle -A PREROUTING -p tcp -m mark --mark 1 -j TPROXY --on-port 8080 --tproxy-mark 1",
        "-t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
        "-t raw -A OUTPUT -p udp --dport 53 -j CT --zone 1",
        "-t nat -A POSTROUTING -s 10.0.0.0/8 -m addrtype ! --dst-type LOCAL -j MASQUERADE",
        "-A INPUT -p tcp -m multiport --dports 1,2 -m limit --limit 1/s -j REJECT",
        "-A INPUT -p tcp -m statistic --mode random --probability 0.5 -j LOG",
        "-A INPUT -p tcp -m connlimit --connlimit-above 9 -m recent --set --name x -j DROP",
    ],
)
def test_common_iptables_rules_are_accepted(cri: Cri, firewall: str, rule: str) -> None:
    for form in ("nft", "legacy"):
        output_of(cri, firewall, f"iptables-{form} {rule}")
        output_of(cri, firewall, f"iptables-{form} {rule.replace('-A', '-D', 1)}")


def test_veth_and_bridge_can_be_created(cri: Cri, firewall: str) -> None:
    output_of(cri, firewall, "ip link add v0 type veth peer name v1 && ip link add br9 type bridge")
    output_of(cri, firewall, "ip link set v0 master br9 && ip link del v0 && ip link del br9")
