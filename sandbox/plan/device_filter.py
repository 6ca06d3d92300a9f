"""Which devices a container may open or make: an eBPF program for its cgroup. Pure.

A device node is only a name: with CAP_MKNOD, which containers have by default, a process makes a
node for any device. So the cgroup decides. No container may open the agent's port, the guest's memory
(/dev/mem) or its console.

The program gets struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor } in r1, where
access_type is access << 16 | type, and returns 1 (allowed) or 0 (EPERM): linux/bpf.h. Each rule
is a block that returns 1 or falls through to the next; after the last one 0 is returned.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from sandbox.plan.devices import STANDARD, RequestedDevice
from sandbox.spec import ContainerSpec


class Type(IntEnum):
    """The kind of a device, as the kernel numbers it."""

    BLOCK = 1  # BPF_DEVCG_DEV_BLOCK
    CHARACTER = 2  # BPF_DEVCG_DEV_CHAR


MKNOD = 1  # BPF_DEVCG_ACC_*
READ = 2
WRITE = 4
_ACCESS = {"m": MKNOD, "r": READ, "w": WRITE}
_EVERY_ACCESS = MKNOD | READ | WRITE


@dataclass(frozen=True, slots=True)
class Rule:
    """Allows `access`, a mask of MKNOD, READ and WRITE, to a device; None stands for any number."""

    type: Type
    major: int | None
    minor: int | None
    access: int


# As OCI runtimes allow: any node may be made (not opened); the standard devices and pseudo-terminals
# may be used (config-linux.md, "Default Devices").
DEFAULT_RULES = (
    Rule(Type.CHARACTER, None, None, MKNOD),
    Rule(Type.BLOCK, None, None, MKNOD),
    *(Rule(Type.CHARACTER, node.major, node.minor, _EVERY_ACCESS) for node in STANDARD),
    Rule(Type.CHARACTER, 5, 2, _EVERY_ACCESS),  # ptmx
    Rule(Type.CHARACTER, 136, None, _EVERY_ACCESS),  # pts, and the console made of one
)


def device_filter_for(container: ContainerSpec, devices: Sequence[RequestedDevice]) -> bytes:
    """Return the program for this container; empty (no filter) when it is privileged."""
    return b"" if container.security.privileged else compile_rules(device_rules(devices))


def device_rules(devices: Sequence[RequestedDevice]) -> tuple[Rule, ...]:
    """Return what every container may use, and the devices that this one requests."""
    requested = (
        Rule(
            Type.BLOCK if stat.S_ISBLK(each.node.type) else Type.CHARACTER,
            each.node.major,
            each.node.minor,
            sum(_ACCESS[letter] for letter in set(each.permissions)),
        )
        for each in devices
    )
    return (*DEFAULT_RULES, *requested)


# Opcodes: class | size or operation | source (Documentation/bpf/instruction-set.rst).
_LOAD_WORD = 0x61  # dst = *(u32 *)(src + offset)
_MOVE_REGISTER = 0xBC  # w(dst) = w(src)
_MOVE = 0xB4  # w(dst) = immediate
_AND = 0x54
_SHIFT_RIGHT = 0x74
_JUMP_UNLESS_EQUAL = 0x56  # if w(dst) != immediate skip `offset` instructions
_EXIT = 0x95
_R0, _R1, _R2, _R3, _R4, _R5 = range(6)


def _instruction(opcode: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhI", opcode, src << 4 | dst, offset, immediate & 0xFFFF_FFFF)


def compile_rules(rules: Sequence[Rule]) -> bytes:
    """Return an array of struct bpf_insn that allows what any rule allows and denies the rest."""
    program = [
        _instruction(_LOAD_WORD, _R2, _R1, 0),
        _instruction(_LOAD_WORD, _R4, _R1, 4),
        _instruction(_LOAD_WORD, _R5, _R1, 8),
        _instruction(_MOVE_REGISTER, _R3, _R2),
        _instruction(_AND, _R2, immediate=0xFFFF),  # type
        _instruction(_SHIFT_RIGHT, _R3, immediate=16),  # access
    ]
    for rule in rules:
        program += _block(rule)
    program += [_instruction(_MOVE, _R0, immediate=0), _instruction(_EXIT)]
    return b"".join(program)


def _block(rule: Rule) -> list[bytes]:
    # (computation, register, value that it must have)
    tests: list[tuple[list[bytes], int, int]] = [([], _R2, rule.type)]
    if rule.access != _EVERY_ACCESS:
        refused = [
            _instruction(_MOVE_REGISTER, _R1, _R3),
            _instruction(_AND, _R1, immediate=~rule.access),
        ]
        tests.append((refused, _R1, 0))
    if rule.major is not None:
        tests.append(([], _R4, rule.major))
    if rule.minor is not None:
        tests.append(([], _R5, rule.minor))
    # built from the end: a jump skips the instructions that are in the block already
    block = [_instruction(_MOVE, _R0, immediate=1), _instruction(_EXIT)]
    for computation, register, value in reversed(tests):
        jump = _instruction(_JUMP_UNLESS_EQUAL, register, offset=len(block), immediate=value)
        block = [*computation, jump, *block]
    return block
