"""hosts, hostname and resolv.conf of a pod, from its specification and the node's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.errors import InvalidSpec
from sandbox.plan.pod_files import NodeFiles, PodFiles, pod_files, resolv_conf
from sandbox.spec import Dns, PodSpec
from sandbox.steps.node_files import read_node_files

NODE = NodeFiles(nodename="node-1", hosts=b"192.0.2.1 node-1\n", resolv_conf=b"nameserver 192.0.2.53\n")
POD_ID = "0123456789abcdef" * 4


def made(node: NodeFiles = NODE, **fields: object) -> PodFiles:
    spec = PodSpec(name="web", namespace="default", uid="u1", **fields)  # type: ignore[arg-type]
    return pod_files(spec, node, pod_id=POD_ID, ips=("192.0.2.7", "2001:db8::7"))


def test_pod_without_hostname_is_named_by_its_short_id_at_each_address() -> None:
    files = made()
    assert files.hostname == b"0123456789ab\n"
    assert files.hosts.decode().splitlines() == [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "192.0.2.7\t0123456789ab",
        "2001:db8::7\t0123456789ab",
    ]


def test_pod_with_hostname_keeps_it() -> None:
    assert made(hostname="web-0").hostname == b"web-0\n"
    assert made(hostname="web-0", host_network=True).hostname == b"web-0\n"


def test_pod_with_the_nodes_network_has_its_name_and_hosts_file() -> None:
    files = made(host_network=True)
    assert (files.hostname, files.hosts) == (b"node-1\n", NODE.hosts)


def test_pod_with_the_nodes_network_on_a_node_without_hosts_file_has_a_made_one() -> None:
    node = NodeFiles(nodename="node-1", hosts=None, resolv_conf=b"")
    assert b"192.0.2.7\tnode-1\n" in made(node, host_network=True).hosts


def test_empty_dns_configuration_is_the_nodes_file() -> None:
    assert made().resolv_conf == NODE.resolv_conf


def test_dns_configuration_is_written_in_the_files_order() -> None:
    dns = Dns(servers=("192.0.2.1", "192.0.2.2"), searches=("a.test", "b.test"), options=("ndots:5",))
    expected = b"search a.test b.test\nnameserver 192.0.2.1\nnameserver 192.0.2.2\noptions ndots:5\n"
    assert resolv_conf(dns, b"of the node") == expected


@pytest.mark.parametrize("field", ["servers", "searches", "options"])
@pytest.mark.parametrize("value", ["", "a b", "a\nnameserver x", "\x07"])
def test_dns_entry_that_is_not_one_word_is_rejected_with_its_field(field: str, value: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        resolv_conf(Dns(**{field: (value,)}), b"")
    assert caught.value.field == f"config.dns_config.{field}"


def test_node_files_that_are_absent_are_read_as_none(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"127.0.0.1 localhost\n")
    found = read_node_files(tmp_path / "hosts", tmp_path / "resolv.conf")
    assert (found.hosts, found.resolv_conf) == (b"127.0.0.1 localhost\n", b"")
    assert read_node_files(tmp_path / "no", tmp_path / "no").hosts is None
    assert found.nodename
