"""The store of modules that guests load on demand: what is in it, and by which names it is requested."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.guest_image import cpio
from sandbox.guest_image.build import make_initramfs
from sandbox.guest_image.modules import Device, ModuleStore, make_store
from sandbox.guest_image.vmlinux import find_modules

MODULES = {
    "kernel/net/802/stp": ("llc", ()),
    "kernel/net/llc/llc": ("", ()),
    "kernel/net/bridge/bridge": ("stp,llc", ("rtnl-link-bridge",)),
    "kernel/net/bridge/br_netfilter": ("bridge", ()),
    "kernel/net/netfilter/nf_conntrack": ("", ()),
    "kernel/net/ipv4/netfilter/ip_tables": ("x_tables", ("ipt_icmp",)),
    "kernel/net/netfilter/x_tables": ("", ()),
    "kernel/net/vmw_vsock/vsock": ("", ("net-pf-40",)),
    "kernel/net/vmw_vsock/vsock_loopback": ("vsock", ("net-pf-40",)),
    "kernel/net/vmw_vsock/hv_sock": ("vsock", ("net-pf-40",)),
    "kernel/net/lonely": ("absent", ("lonely-alias",)),
    "kernel/drivers/net/tun": ("", ("devname:net/tun", "char-major-10-200")),
    "kernel/drivers/net/ethernet/intel/e1000": ("", ("pci:v*d*",)),
    "kernel/drivers/net/virtio_net": ("virtio", ("virtio:d00000001v*",)),
    "kernel/drivers/block/loop": (
        "",
        ("block-major-7-*", "char-major-10-237", "devname:loop-control"),
    ),
    "kernel/drivers/watchdog/softdog": ("helper", ()),
    "kernel/drivers/misc/helper": ("", ()),
    "kernel/fs/needs-helper": ("helper", ("fs-helped",)),
}


@pytest.fixture
def store(tmp_path: Path) -> ModuleStore:
    for place, (depends, aliases) in MODULES.items():
        path = tmp_path / f"{place}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        info = [f"depends={depends}", *(f"alias={alias}" for alias in aliases), "license=GPL"]
        path.write_bytes(b"\x7fELF\0" + "\0".join(info).encode() + b"\0")
    return make_store(tmp_path, find_modules(tmp_path), ["virtio", "virtio_net"], keep_signatures=False)


@pytest.fixture
def requests(store: ModuleStore) -> dict[str, list[str]]:
    lines = (line.split() for line in store.files["aliases"].decode().splitlines())
    return {name: [path.rpartition("/")[2].removesuffix(".ko") for path in paths] for name, *paths in lines}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("bridge", ["llc", "stp", "bridge"]),
        ("rtnl-link-bridge", ["llc", "stp", "bridge"]),
        ("ipt_icmp", ["x_tables", "ip_tables"]),
        ("char-major-10-200", ["tun"]),
        ("block-major-7-*", ["loop"]),
        ("vsock", ["vsock", "vsock_loopback"]),
        ("net-pf-40", ["vsock", "vsock_loopback"]),
        ("sysctl:net/bridge", ["llc", "stp", "bridge", "br_netfilter"]),
        ("capability:net_admin", ["x_tables", "ip_tables", "nf_conntrack"]),
        ("fs-helped", ["helper", "needs-helper"]),
    ],
)
def test_request_loads_a_module_after_its_dependencies(
    requests: dict[str, list[str]], name: str, order: list[str]
) -> None:
    assert requests[name] == order


@pytest.mark.parametrize(
    "name",
    ["e1000", "softdog", "hv_sock", "virtio_net", "lonely", "lonely-alias", "pci:v*d*", "devname:net/tun"],
)
def test_module_for_hardware_or_without_its_dependencies_is_left_out(
    requests: dict[str, list[str]], name: str
) -> None:
    assert name not in requests


def test_modules_keep_their_places_and_names(store: ModuleStore) -> None:
    assert "kernel/net/bridge/br_netfilter.ko" in store.files
    assert "kernel/fs/needs-helper.ko" in store.files
    assert "kernel/drivers/misc/helper.ko" in store.files, "another one needs it"


def test_devices_of_drivers_get_nodes_at_the_start(store: ModuleStore) -> None:
    assert store.devices == (Device("loop-control", 10, 237), Device("net/tun", 10, 200))
    archive = make_initramfs(b"agent", {"virtio": b"module"}, store.devices)
    listed = cpio.file("modules/devices", b"loop-control 10 237\nnet/tun 10 200\n")
    assert listed.content in archive and b"modules/virtio.ko" in archive


def test_kernel_without_modules_has_an_empty_store(tmp_path: Path) -> None:
    store = make_store(tmp_path, {}, ["ext4"], keep_signatures=True)
    assert store == ModuleStore({"aliases": b""}, ())
