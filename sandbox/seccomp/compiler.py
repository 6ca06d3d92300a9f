"""A profile compiled to BPF for one container.

libseccomp generates the code. This module adds what it does not support: rules that depend on the
container, and system calls that are newer than the profile.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from sandbox import capabilities
from sandbox.errors import InvalidSpec
from sandbox.seccomp import libseccomp
from sandbox.seccomp.profile import (
    Action,
    Argument,
    Circumstances,
    Filter,
    Flag,
    Operator,
    Profile,
    Rule,
    kernel_version,
)

_FIELD = "config.linux.security_context.seccomp"
_EPERM = 1
_ENOSYS = 38
_MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS

# AUDIT_ARCH_* of linux/audit.h; for x32, libseccomp's number
X86_64 = 0xC000_003E
X86 = 0x4000_0003
X32 = 0x4000_003E
AARCH64 = 0xC000_00B7
ARM = 0x4000_0028
_ARCHITECTURES = {
    "SCMP_ARCH_X86_64": X86_64,
    "SCMP_ARCH_X86": X86,
    "SCMP_ARCH_X32": X32,
    "SCMP_ARCH_AARCH64": AARCH64,
    "SCMP_ARCH_ARM": ARM,
}
# The guest's architectures: libseccomp's token, and Go's name in includes and excludes.
_GUESTS = {"x86_64": ("SCMP_ARCH_X86_64", "amd64"), "aarch64": ("SCMP_ARCH_AARCH64", "arm64")}
_X32_BIT = 0x4000_0000

# SECCOMP_RET_* of linux/seccomp.h
_ACTIONS = {
    Action.KILL: 0,
    Action.KILL_THREAD: 0,
    Action.KILL_PROCESS: 0x8000_0000,
    Action.TRAP: 0x0003_0000,
    Action.ERRNO: 0x0005_0000,
    Action.TRACE: 0x7FF0_0000,
    Action.LOG: 0x7FFC_0000,
    Action.ALLOW: 0x7FFF_0000,
}
_OPERATORS = {operator: number for number, operator in enumerate(Operator, start=1)}
_SPEC_ALLOW = 4
# WAIT_KILLABLE_RECV concerns listeners, which are rejected
_FLAGS = {Flag.TSYNC: 1, Flag.LOG: 2, Flag.SPEC_ALLOW: _SPEC_ALLOW, Flag.WAIT_KILLABLE_RECV: 0}


@lru_cache(maxsize=64)
def compile_profile(
    profile: Profile, granted: int, *, kernel: tuple[int, int], architecture: str = "x86_64"
) -> Filter:
    """Return the filter for a container with these capabilities (a mask) on a guest kernel of this version.

    Results are cached, as they depend on the arguments alone. Raises InvalidSpec for a profile that
    libseccomp rejects or that has more than 4096 instructions, MissingProgram.
    """
    default = _action(profile.default_action, profile.default_errno_ret)
    tokens = _tokens(profile, architecture)
    rules = [
        rule
        for rule in profile.syscalls or ()
        if _applies(rule, granted, kernel, _GUESTS[architecture][1])
        and _action(rule.action, rule.errno_ret)
        != default  # libseccomp rejects a rule with the default action
    ]
    try:
        with libseccomp.Context(default) as context:
            context.use_architectures(tokens)
            context.sort_as_tree()
            for rule in rules:
                _add(context, rule)
            bpf = _newer_calls(profile, default, tokens) + context.export()
    except libseccomp.FilterFailed as error:
        raise InvalidSpec(_FIELD, f"libseccomp rejects the profile: {error}") from error
    if len(bpf) > 8 * _MAX_INSTRUCTIONS:
        raise InvalidSpec(_FIELD, "the profile is too large", f"{_MAX_INSTRUCTIONS} BPF instructions at most")
    return Filter(bpf=bpf, flags=_flags(profile))


def _flags(profile: Profile) -> int:
    if profile.flags is None:
        return _SPEC_ALLOW  # as runc: the cost of speculation control exceeds its use
    total = 0
    for flag in profile.flags:
        total |= _FLAGS[flag]
    return total


def _action(action: Action, errno: int | None) -> int:
    if action is Action.ERRNO:
        return _ACTIONS[action] | (_EPERM if errno is None else errno)
    if action is Action.TRACE:
        return _ACTIONS[action] | (errno or 0)
    return _ACTIONS[action]


def _tokens(profile: Profile, architecture: str) -> tuple[int, ...]:
    """Return the guest's architecture, and those of the profile that its kernel can run as well."""
    native = _GUESTS[architecture][0]
    names = [native, *(profile.architectures or ())]
    for entry in profile.arch_map or ():
        if entry.architecture == native:
            names += entry.sub_architectures or ()
    family = {X86_64, X86, X32} if native == "SCMP_ARCH_X86_64" else {AARCH64, ARM}
    found = (_ARCHITECTURES.get(name, 0) for name in names)
    return tuple(dict.fromkeys(token for token in found if token in family))


def _applies(rule: Rule, granted: int, kernel: tuple[int, int], architecture: str) -> bool:
    wanted, unwanted = rule.includes or Circumstances(), rule.excludes or Circumstances()
    return (
        all(capabilities.includes(granted, name) for name in wanted.caps or ())
        and (not wanted.arches or architecture in wanted.arches)
        and (not wanted.min_kernel or kernel >= (kernel_version(wanted.min_kernel) or kernel))
        and not any(capabilities.includes(granted, name) for name in unwanted.caps or ())
        and architecture not in (unwanted.arches or ())
        and not (unwanted.min_kernel and kernel >= (kernel_version(unwanted.min_kernel) or kernel))
    )


def _add(context: libseccomp.Context, rule: Rule) -> None:
    action = _action(rule.action, rule.errno_ret)
    compares = [_compare(argument) for argument in rule.args or ()]
    repeated = len({index for index, *_ in compares}) < len(compares)
    # A rule cannot test an argument twice; OCI runtimes then treat the tests as alternatives.
    alternatives = [[compare] for compare in compares] if repeated else [compares]
    for name in rule.all_names():
        for alternative in alternatives:
            context.add(name, action, alternative)


def _compare(argument: Argument) -> libseccomp.CompareTriple:
    return argument.index, _OPERATORS[argument.op], argument.value, argument.value_two


# Classic BPF (linux/filter.h): load a word of struct seccomp_data, jump, return.
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ABOVE, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET = 0, 4


def _newer_calls(profile: Profile, default: int, tokens: Sequence[int]) -> bytes:
    """Return instructions to prepend to a filter that fails unknown calls with an error.

    A C library that tries a new system call falls back on ENOSYS and fails on EPERM. So calls whose
    numbers are above all that the profile names, and which are therefore newer, must fail with ENOSYS.
    """
    if profile.default_action is not Action.ERRNO or default == _ACTIONS[Action.ERRNO] | _ENOSYS:
        return b""
    blocks = []
    names = {name for rule in profile.syscalls or () for name in rule.all_names()}
    for token in tokens:
        newest = max((libseccomp.resolve(name, token) for name in names), default=-1)
        if token != X32 and newest >= 0:
            blocks.append(_newer_than(newest, token))
    return b"".join(blocks)


def _newer_than(newest: int, token: int) -> bytes:
    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    return b"".join(
        (
            instruction(_LOAD, _ARCHITECTURE_OFFSET),
            instruction(_JUMP_IF_EQUAL, token, 0, 4),
            instruction(_LOAD, _NUMBER_OFFSET),
            # x32 shares the architecture word with x86-64, and numbers differently
            instruction(_JUMP_IF_SET, _X32_BIT, 2, 0),
            instruction(_JUMP_IF_ABOVE, newest, 0, 1),
            instruction(_RETURN, _ACTIONS[Action.ERRNO] | _ENOSYS),
        )
    )
