"""The command lines of QEMU, pinned by golden files; HUSK_UPDATE_GOLDEN=1 rewrites them."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from sandbox.errors import InvalidSpec
from sandbox.vmm import NicSpec, ShareSpec, VmSpec
from sandbox.vmm.qemu.argv import Fds, NicFds, plan

GOLDEN = Path(__file__).parent.parent / "golden" / "launch"
SHARES = (
    ShareSpec(tag="rootfs", source="/run/husk/pods/p1/share/rootfs", cache="always"),
    ShareSpec(tag="volumes", source="/run/husk/pods/p1/share/volumes", cache="auto"),
)
BARE = VmSpec(
    pod_id="p1",
    run_dir="/run/husk/pods/p1",
    kernel="/guest/vmlinux",
    initramfs="/guest/initramfs",
    accelerator="tcg",
    memory_mib=256,
    vcpus=1,
)
POD = msgspec.structs.replace(
    BARE,
    memory_mib=1024,
    vcpus=2,
    kernel_args=("husk.debug=1",),
    shares=SHARES,
    nics=(NicSpec(mac="02:00:00:00:00:01", mtu=1450),),
    netns="/run/husk/netns/p1",
    cgroups=("/sys/fs/cgroup/husk/husk-p1",),
)
GROWING = msgspec.structs.replace(BARE, max_memory_mib=2304, max_vcpus=4, max_nics=5, max_disks=24)
FDS = Fds(kernel=10, initramfs=11, monitor=12, console=13, channel=14, shares={})
POD_FDS = msgspec.structs.replace(FDS, shares={"rootfs": 15, "volumes": 16}, nics=(NicFds(tap=17),))
CASES = {
    "bare-tcg": (BARE, FDS),
    "pod-tcg": (POD, POD_FDS),
    "pod-kvm-vhost": (
        msgspec.structs.replace(POD, accelerator="kvm"),
        msgspec.structs.replace(POD_FDS, nics=(NicFds(tap=17, vhost=18),)),
    ),
    "bare-kvm-cpu": (
        msgspec.structs.replace(BARE, accelerator="kvm", options={"cpu": "host,-arch-capabilities"}),
        FDS,
    ),
    "saved": (msgspec.structs.replace(GROWING, savable=True), msgspec.structs.replace(FDS, ram=19)),
    "restored": (
        msgspec.structs.replace(GROWING, template="/run/husk/templates/k", shares=SHARES),
        msgspec.structs.replace(POD_FDS, kernel=-1, initramfs=-1, ram=19, nics=()),
    ),
    "two-nics": (
        msgspec.structs.replace(
            BARE, nics=(NicSpec(mac="02:00:00:00:00:01"), NicSpec(mac="02:00:00:00:00:02"))
        ),
        msgspec.structs.replace(FDS, nics=(NicFds(tap=20), NicFds(tap=21))),
    ),
}


def written(argv: tuple[str, ...]) -> str:
    """One option with its value per line."""
    lines: list[str] = []
    for word in argv[1:]:
        if word.startswith("-") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join([argv[0], *lines]) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_argv_of_each_case_matches_its_golden_file(name: str) -> None:
    spec, fds = CASES[name]
    launch = plan("qemu-system-x86_64", spec, fds)
    text = written(launch.argv)
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("HUSK_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert sorted(launch.pass_fds) == sorted(fds.all())


@pytest.mark.parametrize("name", ["pod-tcg", "restored"])
def test_argv_contains_no_path_of_the_host(name: str) -> None:
    launch = plan("qemu-system-x86_64", *CASES[name])
    parts = ("/run/husk", "/guest/", "/sys/")
    assert not any(part in " ".join(launch.argv) for part in parts)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("options", {"machine": "q35,accel=kvm"}),
        ("options", {"machine": ""}),
        ("options", {"cpu": "host kvm=on/x"}),
        ("options", {"bios": "/etc/passwd"}),
        ("pod_id", "a,b"),
        ("accelerator", "hvf"),
        ("memory_mib", 1),
        ("vcpus", 0),
        ("shares", (ShareSpec(tag="a,path=/etc", source="/", cache="auto"),)),
        ("nics", (NicSpec(mac="02:00,romfile=/x"),)),
        ("shares", (*SHARES, *SHARES)),
        ("max_disks", 30),
    ],
)
def test_value_that_would_add_an_option_is_rejected(field: str, value: object) -> None:
    with pytest.raises(InvalidSpec):
        plan("qemu-system-x86_64", msgspec.structs.replace(BARE, **{field: value}), FDS)
