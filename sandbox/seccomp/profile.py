"""A seccomp profile, and its JSON form. Pure.

Two dialects are parsed: the OCI runtime-spec's (config-linux.md, "Seccomp": architectures, flags), and
Docker's, a superset with archMap and rules that depend on capabilities, architecture and kernel
(includes, excludes). Unknown fields are ignored, as other runtimes do.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import msgspec

from sandbox.errors import InvalidSpec

_FIELD = "config.linux.security_context.seccomp.localhost_ref"
_U64 = (1 << 64) - 1


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled profile.

    `bpf` is an array of struct sock_filter; empty: unconfined. `flags` are SECCOMP_FILTER_FLAG_*.
    """

    bpf: bytes = b""
    flags: int = 0


class Action(StrEnum):
    """What happens to a system call: SECCOMP_RET_* of seccomp(2)."""

    KILL = "SCMP_ACT_KILL"
    KILL_THREAD = "SCMP_ACT_KILL_THREAD"
    KILL_PROCESS = "SCMP_ACT_KILL_PROCESS"
    TRAP = "SCMP_ACT_TRAP"
    ERRNO = "SCMP_ACT_ERRNO"
    TRACE = "SCMP_ACT_TRACE"
    LOG = "SCMP_ACT_LOG"
    ALLOW = "SCMP_ACT_ALLOW"


class Operator(StrEnum):
    """How an argument is compared, in the order of libseccomp's enum scmp_compare."""

    NE = "SCMP_CMP_NE"
    LT = "SCMP_CMP_LT"
    LE = "SCMP_CMP_LE"
    EQ = "SCMP_CMP_EQ"
    GE = "SCMP_CMP_GE"
    GT = "SCMP_CMP_GT"
    MASKED_EQ = "SCMP_CMP_MASKED_EQ"


class Flag(StrEnum):
    """SECCOMP_FILTER_FLAG_* of seccomp(2)."""

    TSYNC = "SECCOMP_FILTER_FLAG_TSYNC"
    LOG = "SECCOMP_FILTER_FLAG_LOG"
    SPEC_ALLOW = "SECCOMP_FILTER_FLAG_SPEC_ALLOW"
    WAIT_KILLABLE_RECV = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"


Errno = Annotated[int, msgspec.Meta(ge=0, le=4095)]


class Argument(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A condition on one argument. With MASKED_EQ: (argument & value) == value_two."""

    index: Annotated[int, msgspec.Meta(ge=0, le=5)]
    value: Annotated[int, msgspec.Meta(ge=0)]
    value_two: Annotated[int, msgspec.Meta(ge=0)] = 0
    op: Operator


class Circumstances(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A condition on the container.

    In `includes` all must hold (any one of the architectures), in `excludes` none may.
    """

    caps: tuple[str, ...] | None = None
    arches: tuple[str, ...] | None = None
    min_kernel: str = ""


class Rule(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An action for system calls, under conditions."""

    names: tuple[str, ...] | None = None
    name: str = ""  # Docker's, older than `names`
    action: Action
    errno_ret: Errno | None = None
    args: tuple[Argument, ...] | None = None
    includes: Circumstances | None = None
    excludes: Circumstances | None = None

    def all_names(self) -> tuple[str, ...]:
        """Return the names of both fields."""
        return (*(self.names or ()), *((self.name,) if self.name else ()))


class Architecture(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An entry of Docker's archMap: which architectures a native one includes."""

    architecture: str
    sub_architectures: tuple[str, ...] | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A profile of either dialect."""

    default_action: Action
    default_errno_ret: Errno | None = None
    architectures: tuple[str, ...] | None = None
    arch_map: tuple[Architecture, ...] | None = None
    flags: tuple[Flag, ...] | None = None
    listener_path: str = ""
    syscalls: tuple[Rule, ...] | None = None


_decoder = msgspec.json.Decoder(Profile)
_KERNEL = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\..*)?", re.ASCII)


def kernel_version(text: str) -> tuple[int, int] | None:
    """Return (6, 1) for "6.1" or "6.1.0-13-amd64"; None for anything else."""
    match = _KERNEL.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def parse_profile(content: bytes, path: str) -> Profile:
    """Return the profile in a file's content.

    Raises InvalidSpec with `path` and the JSON path of the error.
    """
    try:
        profile = _decoder.decode(content)
    except msgspec.DecodeError as error:  # a ValidationError says where: "... - at `$.syscalls[0]`"
        raise InvalidSpec(_FIELD, f"{path}: {error}", "an OCI or Docker seccomp profile") from error
    except RecursionError as error:
        raise InvalidSpec(_FIELD, f"{path}: nested too deeply", "an OCI or Docker seccomp profile") from error
    if profile.listener_path:
        raise _malformed(
            path, "$.listenerPath", "a process of the host cannot listen to a guest's system calls"
        )
    for number, rule in enumerate(profile.syscalls or ()):
        _check_rule(rule, path, f"$.syscalls[{number}]")
    return profile


def _check_rule(rule: Rule, path: str, place: str) -> None:
    names = rule.all_names()
    if not names or (rule.names and rule.name):
        raise _malformed(path, f"{place}.names", "needs at least one name, and not `name` as well")
    if any("\0" in name for name in names):
        raise _malformed(path, f"{place}.names", "has a zero byte")
    for number, argument in enumerate(rule.args or ()):
        if max(argument.value, argument.value_two) > _U64:
            raise _malformed(path, f"{place}.args[{number}]", "a value has more than 64 bits")
    for word, where in (("includes", rule.includes), ("excludes", rule.excludes)):
        if where and where.min_kernel and kernel_version(where.min_kernel) is None:
            raise _malformed(path, f"{place}.{word}.minKernel", f"{where.min_kernel!r} is not a version")


def _malformed(path: str, place: str, problem: str) -> InvalidSpec:
    return InvalidSpec(_FIELD, f"{path}: {problem} - at `{place}`")
