"""Every plug-in and version of the CNI SPEC: a pod is attached, reachable through its tap, and released.

Debian's plug-ins support versions up to 1.0.0; fakes stand in for 1.1.0. The guest is a second namespace at
the other end of the tap, see tests/fakes/cni/guest.py.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from network import netns
from network.attach import Networks
from network.errors import CniError, TapError, Unsatisfiable
from network.spec import Attachment, PublishedPort
from tests.fakes.cni.guest import Guest, fetch
from tests.fakes.cni.space import CLEAN, PORTMAP, Space, bridge, in_space, make_request

WEB = b"from the web" * 20_000  # larger than any window, so that segments and checksums matter
PORTS = (
    PublishedPort(protocol="TCP", container_port=80, host_port=8080),
    PublishedPort(protocol="TCP", container_port=80, host_port=8081, host_ip="10.77.0.1"),
)
UPLINK = "ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up"
DEFAULTS = {("0.0.0.0/0", "10.77.0.1"), ("::/0", "fd77::1")}


async def get(host: str, port: int = 80, guest: Guest | None = None) -> str:
    """Fetch WEB and return the address that the server saw the connection come from."""
    call = (lambda: guest.inside(lambda: fetch(host, port))) if guest else (lambda: fetch(host, port))
    peer, _, body = (await asyncio.to_thread(call)).partition(b" ")
    assert body == WEB
    return peer.decode()


async def start(space: Space, networks: Networks, pod_id: str, **fields: Any) -> tuple[Attachment, Guest]:
    """Attach as for a VM: its first tap exists before its interface."""
    first = await networks.prepare(pod_id)
    attachment = await networks.up(make_request(pod_id, **fields))
    taps = (first, *await networks.open_taps(pod_id, begin=1))
    return attachment, Guest(space.root / f"guest-{pod_id}", attachment, taps)


@in_space
async def test_bridge_with_portmap_is_reachable_also_by_hairpin(space: Space) -> None:
    space.configure(bridge(ipMasq=True), PORTMAP)
    networks = space.networks()
    web, web_guest = await start(space, networks, "web", ports=PORTS)
    other, other_guest = await start(space, networks, "other")
    with web_guest, other_guest, web_guest.serve(80, WEB):
        ipv4, ipv6 = web.ips
        # from the node, in both address families
        assert (await get(ipv4), await get(ipv6)) == ("10.77.0.1", "fd77::1")
        # from another pod, and from the pod itself
        assert (await get(ipv4, guest=other_guest), await get(ipv6, guest=other_guest)) == other.ips
        assert await get(ipv4, guest=web_guest) == ipv4
        # published ports: on the node, on its loopback, from a pod, and from the pod itself (hairpin)
        for port in (8080, 8081):
            await get("10.77.0.1", port)
        await get("127.0.0.1", 8080)
        await get("10.77.0.1", 8080, other_guest)
        await get("10.77.0.1", 8080, web_guest)
        # the second mapping is for one address of the node only
        with pytest.raises(OSError):
            await asyncio.to_thread(fetch, "127.0.0.1", 8081, 1)
    assert [nic.addresses for nic in web.interfaces] == [("10.77.0.2/24", "fd77::2/64")]
    assert {(route.destination, route.gateway) for route in web.routes} == DEFAULTS
    await networks.down("web")
    await networks.down("other")
    assert space.census() == CLEAN
    await networks.down("web")


@in_space
async def test_ptp_routes_through_its_gateway(space: Space) -> None:
    space.configure({**bridge(), "type": "ptp"})
    networks = space.networks()
    web, web_guest = await start(space, networks, "web")
    other, other_guest = await start(space, networks, "other")
    with web_guest, other_guest, web_guest.serve(80, WEB):
        assert web.interfaces[0].addresses == ("10.77.0.2/32", "fd77::2/128")
        assert await get(web.ips[0]) == "10.77.0.1"
        assert await get(web.ips[1])
        assert await get(web.ips[0], guest=other_guest) == other.ips[0]
    await networks.down("web")
    await networks.down("other")
    assert space.census() == CLEAN


@in_space
async def test_macvlan_with_a_smaller_mtu(space: Space) -> None:
    space.sh(UPLINK + "; ip addr add 10.77.0.1/24 dev up1; ip -6 addr add fd77::1/64 dev up1")
    space.configure({**bridge(), "type": "macvlan", "master": "up0", "mtu": 1400})
    networks = space.networks()
    web, guest = await start(space, networks, "web")
    with guest, guest.serve(80, WEB):
        assert web.interfaces[0].mtu == 1400
        assert (await get(web.ips[0]), await get(web.ips[1])) == ("10.77.0.1", "fd77::1")
    await networks.down("web")
    assert space.census() == CLEAN


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0"])
@in_space
async def test_each_version_of_debians_plugins_attaches_and_releases(space: Space, version: str) -> None:
    space.configure(bridge(ipMasq=True), version=version)
    networks = space.networks()
    attachment = await networks.up(make_request())
    assert attachment.ips == ("10.77.0.2", "fd77::2")
    await networks.check("pod-1")
    await networks.down("pod-1")
    assert space.census() == CLEAN


@in_space
async def test_check_fails_after_an_address_was_removed(space: Space) -> None:
    space.configure(bridge(ipMasq=True))
    networks = space.networks()
    attachment = await networks.up(make_request())
    space.sh(f"nsenter --net={attachment.netns} ip addr del 10.77.0.2/24 dev eth0")
    with pytest.raises(CniError, match=r"10\.77\.0\.2"):
        await networks.check("pod-1")
    # the bridge plug-in finds the rules that it made by the addresses on the interface
    space.sh(f"nsenter --net={attachment.netns} ip addr add 10.77.0.2/24 dev eth0")
    await networks.down("pod-1")
    assert space.census() == CLEAN


@in_space
async def test_phases_of_1_1_pass_the_specified_input(space: Space) -> None:
    """What each plug-in of a chain gets in each phase."""
    for name in ("first", "second"):
        space.add_fake(name)
    log = {"log": str(space.log)}
    result = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "mtu": 1450, "sandbox": "/ns"}],
        "ips": [{"address": "10.5.0.2/24", "gateway": "10.5.0.1", "interface": 0}],
        "routes": [{"dst": "0.0.0.0/0", "priority": 3}],
        "dns": {"nameservers": ["10.5.0.1"], "domain": "d", "search": ["s", "d"], "options": ["o"]},
    }
    make = "ip link add eth0 type veth peer name x0; ip link set eth0 up; ip addr add 10.5.0.2/24 dev eth0"
    space.configure(
        {"type": "first", "result": result, "inside": make, **log},
        {"type": "second", "capabilities": {"portMappings": True, "cgroupPath": True}, **log},
        version="1.1.0",
    )
    networks = space.networks()
    attachment = await networks.up(make_request(ports=PORTS[:1], cgroup_path="/c"))
    assert (attachment.dns_servers, attachment.dns_searches, attachment.dns_options) == (
        ("10.5.0.1",),
        ("d", "s"),
        ("o",),
    )
    await networks.check("pod-1")
    await networks.gc(["pod-1"])
    await networks.down("pod-1")
    calls = space.calls()
    assert [(call["verb"], call["plugin"]) for call in calls] == [
        ("ADD", "first"),
        ("ADD", "second"),
        ("CHECK", "first"),
        ("CHECK", "second"),
        ("GC", "first"),
        ("GC", "second"),
        ("DEL", "second"),
        ("DEL", "first"),
    ]
    add_first, add_second, check_first, _, collect, _, delete_second, delete_first = calls
    assert "prevResult" not in add_first["conf"] and "runtimeConfig" not in add_first["conf"]
    assert add_second["conf"]["prevResult"] == result
    assert add_second["conf"]["runtimeConfig"] == {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
        "cgroupPath": "/c",
    }
    for call in (check_first, delete_second, delete_first):
        assert call["conf"]["prevResult"] == result
        assert call["variables"] | {"CNI_COMMAND": "ADD"} == add_first["variables"]
    assert collect["conf"]["cni.dev/valid-attachments"] == [{"containerID": "pod-1", "ifname": "eth0"}]
    assert space.census() == CLEAN


@in_space
async def test_several_interfaces_of_one_result_have_taps_in_order(space: Space) -> None:
    space.add_fake("multi")
    make = "".join(
        f"ip link add {name} type veth peer name p{name}; ip link set {name} up; ip link set p{name} up;"
        f"ip addr add 10.{number}.0.2/24 dev {name};"
        for number, name in enumerate(("eth0", "net1"), 5)
    )
    box = {"sandbox": "/ns"}
    result = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "host0"}, {"name": "eth0", **box}, {"name": "net1", **box}],
        "ips": [{"address": "10.6.0.2/24", "interface": 2}, {"address": "10.5.0.2/24", "interface": 1}],
    }
    space.configure({"type": "multi", "result": result, "inside": make})
    networks = space.networks()
    attachment = await networks.up(make_request())
    assert [(nic.name, nic.tap, nic.addresses) for nic in attachment.interfaces] == [
        ("eth0", "tap0", ("10.5.0.2/24",)),
        ("net1", "tap1", ("10.6.0.2/24",)),
    ]
    assert attachment.ips == ("10.5.0.2",)
    taps = await networks.open_taps("pod-1")
    assert len(taps) == 2
    filters = space.sh(f"nsenter --net={attachment.netns} tc filter show dev net1 ingress")
    assert "Egress Redirect to device tap1" in filters
    for tap in taps:
        os.close(tap)
    await networks.down("pod-1")
    assert space.census() == CLEAN


@pytest.mark.parametrize("named", [(), ("eth0",), ("net1",)])
@in_space
async def test_interface_that_the_result_does_not_name_is_the_pods_too(
    space: Space, named: tuple[str, ...]
) -> None:
    """As of a plug-in for several networks, which reports the first alone."""
    space.add_fake("multi")
    make = "".join(
        f"ip link add {name} type veth peer name p{name}; ip link set {name} up; ip link set p{name} up;"
        f"ip addr add 10.{number}.0.2/24 dev {name};"
        for number, name in enumerate(("net1", "eth0"), 5)
    )
    result = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": name, "sandbox": "/ns"} for name in named],
        "ips": [{"address": "10.6.0.2/24"}],
    }
    space.configure({"type": "multi", "result": result, "inside": make})
    networks = space.networks()
    attachment = await networks.up(make_request())
    assert [(nic.name, nic.tap, nic.addresses) for nic in attachment.interfaces] == [
        ("eth0", "tap0", ("10.6.0.2/24",)),
        ("net1", "tap1", ("10.5.0.2/24",)),
    ]
    assert attachment.ips == ("10.6.0.2",)
    for tap in await networks.open_taps("pod-1"):
        os.close(tap)
    await networks.down("pod-1")
    assert space.census() == CLEAN


@in_space
async def test_taps_can_be_opened_again_for_a_new_vm(space: Space) -> None:
    """Taps go with their descriptors; the next ones are connected in their place."""
    space.configure(bridge())
    networks = space.networks()
    attachment = await networks.up(make_request())
    (tap,) = await networks.open_taps("pod-1")
    with pytest.raises(TapError, match="still has it open"):
        await networks.open_taps("pod-1")
    os.close(tap)
    assert "tap0" not in space.sh(f"nsenter --net={attachment.netns} ip link")
    with (
        Guest(space.root / "guest", attachment, await networks.open_taps("pod-1")) as guest,
        guest.serve(80, WEB),
    ):
        assert await get(attachment.ips[0]) == "10.77.0.1"
    await networks.down("pod-1")
    assert space.census() == CLEAN


@in_space
async def test_concurrent_pods_get_different_addresses(space: Space) -> None:
    space.configure(bridge())
    networks = space.networks()
    pods = [f"pod-{number}" for number in range(8)]
    attachments = await asyncio.gather(*(networks.up(make_request(pod)) for pod in pods))
    assert len({attachment.ips[0] for attachment in attachments}) == len(pods)
    assert networks.list_leftovers() == tuple(pods)
    await asyncio.gather(*(networks.down(pod) for pod in pods))
    assert space.census() == CLEAN
    assert networks.list_leftovers() == ()


@in_space
async def test_pod_cidr_is_passed_to_host_local(space: Space) -> None:
    ipam = {"type": "host-local", "routes": [{"dst": "0.0.0.0/0"}]}
    space.configure(bridge(ipam=ipam, capabilities={"ipRanges": True}))
    space.networks().update_pod_cidr("10.99.7.0/24,fd99::/64")
    networks = space.networks()  # a later daemon
    attachment = await networks.up(make_request())
    assert attachment.ips == ("10.99.7.2", "fd99::2")
    await networks.down("pod-1")
    assert space.census() == {**CLEAN, "cache": frozenset({"pod-cidr"})}
    assert networks.list_leftovers() == ()


@in_space
async def test_bandwidth_annotation_limits_the_rate(space: Space) -> None:
    space.configure(bridge(), {"type": "bandwidth", "capabilities": {"bandwidth": True}})
    networks = space.networks()
    await networks.up(make_request(annotations={"kubernetes.io/ingress-bandwidth": "8M"}))
    assert "rate 8Mbit" in space.sh("tc qdisc show")
    await networks.down("pod-1")
    assert space.census() == CLEAN


@in_space
async def test_sample_configuration_is_reachable(space: Space) -> None:
    sample = Path(__file__).parents[2] / "deploy/cni/10-husk-bridge.conflist"
    (space.conf_dir / sample.name).write_bytes(sample.read_bytes())
    networks = space.networks()
    attachment, guest = await start(space, networks, "web", ports=PORTS[:1])
    with guest, guest.serve(80, WEB):
        for host, port in ((attachment.ips[0], 80), (attachment.ips[1], 80), ("127.0.0.1", 8080)):
            await get(host, port)
    await networks.down("web")
    assert space.census() == CLEAN


@in_space
async def test_pod_that_is_attached_cannot_be_attached_again(space: Space) -> None:
    space.configure(bridge())
    networks = space.networks()
    attachment = await networks.up(make_request())
    with pytest.raises(Unsatisfiable, match="attached already"):
        await networks.up(make_request())
    assert netns.is_namespace(Path(attachment.netns))
    await networks.down("pod-1")


@in_space
async def test_taps_without_a_network_are_refused(space: Space) -> None:
    with pytest.raises(TapError, match="network of pod pod-1 is not up"):
        await space.networks().open_taps("pod-1")
