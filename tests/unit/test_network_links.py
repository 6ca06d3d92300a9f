"""What the guest is given of the interfaces and routes in the pod's namespace."""

from __future__ import annotations

from typing import Any

import pytest

from network.errors import TapError
from network.links import (
    find_names,
    guest_addresses,
    guest_routes,
    list_links,
    open_netlink,
    read_links,
)
from network.result import Result, ResultInterface
from network.spec import Interface, Route
from tests.fakes.cni.space import Space, in_space

UP, LOOPBACK = 1, 8


class Link(dict[str, Any]):
    """A message of rtnetlink, or a nested attribute of one."""

    def get_attr(self, name: str) -> object:
        """Return an attribute, None if it is not there."""
        return self.get(name)


def link(flags: int = UP, kind: int = 1, index: int = 9, **attributes: object) -> Link:
    return Link({"flags": flags, "ifi_type": kind, "index": index, **attributes})


LINKS: dict[str, Any] = {
    "lo": link(UP | LOOPBACK, 772),
    "tunl0": link(0, 768),
    "net1": link(IFLA_LINK=9, IFLA_LINK_NETNSID=0),
    "eth0": link(),
    "down0": link(0),
    "wg0": link(UP, 65534),
    "tap0": link(IFLA_LINKINFO=Link(IFLA_INFO_KIND="tun")),
    "port0": link(IFLA_MASTER=7),
    "peer0": link(IFLA_LINK=9, index=20),
}


def result(*interfaces: tuple[str, str]) -> Result:
    return Result(interfaces=tuple(ResultInterface(name=name, sandbox=box) for name, box in interfaces))


def test_result_names_and_orders_interfaces() -> None:
    found = find_names(
        result(("cni0", ""), ("eth0", "/ns"), ("net1", "/ns"), ("eth0", "/ns"), ("lo", "/ns")), LINKS
    )
    assert found == ["eth0", "net1"]


@pytest.mark.parametrize(
    "named", [(), (("eth0", "/ns"),), (("cni0", ""), ("net1", "/ns")), (("net1", "/ns"), ("eth0", "/ns"))]
)
def test_interface_that_the_result_does_not_name_is_the_pods_if_it_is_up(
    named: tuple[tuple[str, str], ...],
) -> None:
    assert find_names(result(*named), LINKS) == ["eth0", "net1"]


def test_end_of_a_pair_in_the_namespace_counts_with_an_address_only() -> None:
    assert find_names(result(("eth0", "/ns")), LINKS, {20}) == ["eth0", "net1", "peer0"]


@pytest.mark.parametrize(("name", "problem"), [("eth9", "not in the namespace"), ("wg0", "Ethernet")])
def test_missing_or_non_ethernet_interface_is_refused(name: str, problem: str) -> None:
    with pytest.raises(TapError, match=problem):
        find_names(result((name, "/ns")), LINKS)


def test_namespace_without_interface_is_refused() -> None:
    with pytest.raises(TapError, match="created no interface"):
        find_names(result(("lo", "/ns")), {"lo": LINKS["lo"]})


def test_address_keeps_its_prefix_only_with_its_route() -> None:
    routes = [
        Route(destination="10.1.0.0/24", interface="eth0"),
        Route(destination="10.2.0.0/24", interface="eth1"),
    ]
    cidrs = ["10.1.0.5/24", "10.2.0.5/24", "fd00::5/64", "fe80::1/64"]
    assert guest_addresses(cidrs, "eth0", routes) == ("10.1.0.5/24", "10.2.0.5/32", "fd00::5/128")


def test_routes_that_a_kernel_adds_by_itself_are_left_out() -> None:
    nic = Interface(name="eth0", tap="tap0", mac="", mtu=1500, addresses=("10.1.0.5/24", "fd00::5/64"))
    kept = (
        Route(destination="10.9.0.0/16", interface="eth0"),
        Route(destination="0.0.0.0/0", gateway="10.1.0.1", interface="eth0"),
        Route(destination="10.1.0.0/24", gateway="10.1.0.1", interface="eth0"),
    )
    automatic = (
        Route(destination="10.1.0.0/24", interface="eth0"),
        Route(destination="fd00::/64", interface="eth0", metric=256),
        Route(destination="fe80::/64", interface="eth0", metric=256),
    )
    routes = [kept[1], automatic[0], kept[0], *automatic[1:], kept[2]]
    assert guest_routes(routes, [nic]) == kept


@in_space
def test_addresses_and_routes_are_read_from_the_kernel(space: Space) -> None:
    space.sh("""set -e
    ip link add eth0 type veth peer name peer0
    ip link add net1 type veth peer name peer1
    ip link set eth0 address 02:00:00:00:00:01 mtu 1400
    for i in eth0 peer0 net1 peer1; do ip link set $i up; done
    ip addr add 10.1.0.5/24 dev eth0
    ip addr add 10.1.0.6/24 dev eth0
    ip addr add 169.254.7.7/32 dev eth0
    ip addr add fd00::5/64 dev eth0
    ip addr add 10.3.0.5 peer 10.3.0.1/32 dev net1
    ip route add default via 10.1.0.1 mtu 1300 metric 7
    ip route add 10.8.0.0/16 via 192.0.2.1 dev eth0 onlink
    ip route add 10.9.0.0/16 nexthop via 10.1.0.1 nexthop via 10.1.0.2
    ip route add blackhole 10.10.0.0/16
    ip route add 10.11.0.0/16 dev eth0 table 100
    ip -6 route add default via fd00::1 metric 9
    """)
    with open_netlink() as netlink:
        interfaces, routes = read_links(
            netlink, list_links(netlink), result(("eth0", "/ns"), ("net1", "/ns"))
        )
    first, second = interfaces
    assert (first.name, first.tap, first.mac, first.mtu) == ("eth0", "tap0", "02:00:00:00:00:01", 1400)
    assert first.addresses == ("10.1.0.5/24", "169.254.7.7/32", "10.1.0.6/24", "fd00::5/64")
    assert (second.tap, second.addresses) == ("tap1", ("10.3.0.5/32",))
    assert set(routes) == {
        Route(destination="10.3.0.1/32", interface="net1"),
        Route(destination="0.0.0.0/0", gateway="10.1.0.1", interface="eth0", metric=7, mtu=1300),
        Route(destination="10.8.0.0/16", gateway="192.0.2.1", interface="eth0", on_link=True),
        Route(destination="10.9.0.0/16", gateway="10.1.0.1", interface="eth0"),
        Route(destination="::/0", gateway="fd00::1", interface="eth0", metric=9),
    }
    assert routes[0].gateway == ""
