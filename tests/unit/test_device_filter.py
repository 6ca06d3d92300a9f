"""The device program: by an interpreter for every case, and by the kernel for a few."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import InvalidSpec
from sandbox.host import bpf
from sandbox.plan.device_filter import (
    DEFAULT_RULES,
    MKNOD,
    READ,
    WRITE,
    Rule,
    Type,
    compile_rules,
    device_filter_for,
)
from sandbox.plan.devices import guest_devices
from sandbox.spec import ContainerSpec, DeviceSpec, SecuritySpec

RW = READ | WRITE
CHAR, BLOCK = Type.CHARACTER, Type.BLOCK


def run(program: bytes, type: int, access: int, major: int, minor: int) -> int:
    """Return what the kernel's interpreter would; it knows only the instructions that we emit."""
    registers = [0] * 11
    context = struct.pack("<III", access << 16 | type, major, minor)
    code = list(struct.iter_unpack("<BBhi", program))
    at = 0
    while True:
        opcode, packed, offset, immediate = code[at]
        dst, src = packed & 0xF, packed >> 4
        at += 1
        match opcode:
            case 0x61:
                (registers[dst],) = struct.unpack_from("<I", context, offset)
            case 0xBC:
                registers[dst] = registers[src]
            case 0xB4:
                registers[dst] = immediate & 0xFFFFFFFF
            case 0x54:
                registers[dst] &= immediate & 0xFFFFFFFF
            case 0x74:
                registers[dst] >>= immediate
            case 0x56:
                assert offset >= 0  # forward only: it ends
                at += offset if registers[dst] != immediate & 0xFFFFFFFF else 0
            case 0x95:
                return registers[0]
            case _:
                raise AssertionError(f"opcode {opcode:#x}")


@pytest.mark.parametrize(
    ("type", "access", "major", "minor", "allowed"),
    [
        (CHAR, RW, 1, 3, True),  # null
        (CHAR, RW | MKNOD, 1, 9, True),  # urandom
        (CHAR, RW, 5, 0, True),  # tty
        (CHAR, RW, 5, 2, True),  # ptmx
        (CHAR, RW, 136, 7, True),  # pts
        (CHAR, MKNOD, 1, 1, True),  # a node may be made of anything
        (BLOCK, MKNOD, 254, 0, True),
        (CHAR, READ, 1, 1, False),  # mem
        (CHAR, READ, 1, 11, False),  # kmsg
        (CHAR, RW, 5, 1, False),  # the guest's console
        (CHAR, RW, 10, 229, False),  # fuse
        (CHAR, WRITE | MKNOD, 1, 1, False),
        (BLOCK, READ, 254, 0, False),
        (BLOCK, RW, 1, 3, False),
        (CHAR, RW, 240, 1, False),  # where virtio ports are
    ],
)
def test_default_filter_allows_standard_devices_alone(
    type: int, access: int, major: int, minor: int, allowed: bool
) -> None:
    assert (
        run(device_filter_for(ContainerSpec(name="c", image="i"), ()), type, access, major, minor) == allowed
    )


def test_privileged_container_has_no_filter() -> None:
    spec = ContainerSpec(name="c", image="i", security=SecuritySpec(privileged=True))
    assert device_filter_for(spec, ()) == b""


def test_requested_device_is_allowed_with_its_permissions() -> None:
    device = DeviceSpec(container_path="/dev/fuse", host_path="/dev/fuse", permissions="r")
    spec = ContainerSpec(name="c", image="i", devices=(device,))
    program = device_filter_for(spec, guest_devices(spec, {}))
    assert run(program, CHAR, READ, 10, 229) == 1
    assert run(program, CHAR, RW, 10, 229) == 0


@pytest.mark.parametrize(
    ("device", "field"),
    [
        (DeviceSpec(container_path="/dev/sda", host_path="/dev/sda"), "host_path"),
        (DeviceSpec(container_path="/dev/null", host_path="/dev/../dev/null"), "host_path"),
        (DeviceSpec(container_path="/dev/x", host_path="/dev/null", permissions="rwx"), "permissions"),
        (DeviceSpec(container_path="dev/x", host_path="/dev/null"), "container_path"),
    ],
)
def test_device_that_no_guest_has_is_rejected_with_its_field(device: DeviceSpec, field: str) -> None:
    null = DeviceSpec(container_path="/dev/null", host_path="/dev/null")
    with pytest.raises(InvalidSpec) as caught:
        guest_devices(ContainerSpec(name="c", image="i", devices=(null, device)), {})
    assert caught.value.field == f"config.devices[1].{field}"


numbers = st.integers(0, 3)
accesses = st.integers(1, 7)
rules = st.builds(Rule, st.sampled_from(Type), st.none() | numbers, st.none() | numbers, accesses)


@given(st.lists(rules, max_size=6), st.sampled_from(Type), accesses, numbers, numbers)
def test_any_rules_compile_to_their_meaning(
    rules: list[Rule], type: Type, access: int, major: int, minor: int
) -> None:
    allowed = any(
        rule.type == type
        and access & ~rule.access == 0
        and rule.major in (None, major)
        and rule.minor in (None, minor)
        for rule in rules
    )
    assert run(compile_rules(rules), type, access, major, minor) == allowed


# ---------------------------------------------------------------------------- in this kernel


def cgroup2_root() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    return None


@pytest.fixture(scope="module")
def kernel_loads_programs() -> None:
    if os.geteuid() != 0:
        pytest.skip("loading a program needs root")
    try:
        os.close(bpf.load_device_filter(compile_rules([])))
    except PermissionError:
        pytest.skip("this kernel does not allow programs to be loaded")


@pytest.mark.usefixtures("kernel_loads_programs")
def test_kernel_rejects_a_malformed_program() -> None:
    with pytest.raises(OSError, match="bpf"):
        bpf.load_device_filter(compile_rules([])[:-8])


TRY = """
import os, sys
def attempt(path):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        return "ok"
    except OSError as error:
        return str(error.errno)
node = sys.argv[2]
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
os.mknod(node, 0o20600, os.makedev(1, 11))
print(attempt("/dev/null"), attempt("/dev/urandom"), attempt(node))
"""


@pytest.mark.usefixtures("kernel_loads_programs")
def test_kernel_accepts_and_enforces_default_filter(tmp_path: Path) -> None:
    root = cgroup2_root()
    if root is None:
        pytest.skip("no cgroup v2 here")
    group = root / f"husk-device-test-{os.getpid()}"
    group.mkdir()
    try:
        bpf.attach_device_filter(group, compile_rules(DEFAULT_RULES))
        done = subprocess.run(
            [sys.executable, "-c", TRY, str(group), str(tmp_path / "kmsg")],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.stdout.split() == ["ok", "ok", "1"], done.stderr
    finally:
        group.rmdir()
