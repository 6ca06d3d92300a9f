"""Capability sets of a process, computed from what a client adds and drops (capabilities(7)).

Bit numbers are those of Linux 6.1 (include/uapi/linux/capability.h), the guest's kernel: "ALL" and
privileged mean every one of them. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sandbox.errors import InvalidSpec
from sandbox.spec import SecuritySpec

_IN_ORDER = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
PERFMON BPF CHECKPOINT_RESTORE
"""
# The default set of a container: the fourteen capabilities that Docker and containerd grant too, and on which
# images rely.
_USUAL = """
AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETPCAP
SETUID SYS_CHROOT
"""
NAMES = tuple(_IN_ORDER.split())
ALL = (1 << len(NAMES)) - 1

_BITS = {name: 1 << number for number, name in enumerate(NAMES)}


def mask_of(names: Iterable[str]) -> int:
    """Return the bits of known names, written as in `NAMES`. Raises KeyError."""
    return sum(_BITS[name] for name in set(names))


def names_of(mask: int) -> list[str]:
    """Return the names of a mask's bits as OCI and seccomp profiles have them: "CAP_KILL"."""
    return [f"CAP_{name}" for number, name in enumerate(NAMES) if mask >> number & 1]


def includes(mask: int, name: str) -> bool:
    """Whether the mask holds the capability of this name; an unknown one it never does."""
    return bool(mask & _BITS.get(_bare(name), 0))


DEFAULT = mask_of(_USUAL.split())


@dataclass(frozen=True, slots=True)
class CapabilitySets:
    """The five capability sets of a process, as bit masks."""

    bounding: int
    permitted: int
    effective: int
    inheritable: int
    ambient: int


def capability_sets(security: SecuritySpec) -> CapabilitySets:
    """Compute the five sets of the first process, which every exec gets too.

    "ALL" is applied before single names, and drops after adds, so `add ALL, drop NET_RAW` and `drop ALL, add
    CHOWN` have their literal meanings. The inheritable set holds the ambient capabilities alone: with more,
    the inheritable bits of a file could grant more than was requested (capabilities(7)). Raises InvalidSpec
    with the field for an unknown name.
    """
    prefix = "config.linux.security_context.capabilities"
    add = _masks(security.add_capabilities, f"{prefix}.add_capabilities")
    drop = _masks(security.drop_capabilities, f"{prefix}.drop_capabilities")
    ambient = _masks(security.ambient_capabilities, f"{prefix}.add_ambient_capabilities")
    granted = ALL if security.privileged else _granted(add + ambient, drop)
    raised = _union(ambient) & granted
    return CapabilitySets(
        bounding=granted, permitted=granted, effective=granted, inheritable=raised, ambient=raised
    )


def _granted(add: tuple[int, ...], drop: tuple[int, ...]) -> int:
    base = DEFAULT
    if ALL in add:
        base = ALL
    if ALL in drop:
        base = 0
    return (base | _union(one for one in add if one != ALL)) & ~_union(one for one in drop if one != ALL)


def _union(masks: Iterable[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


def _masks(names: tuple[str, ...], field: str) -> tuple[int, ...]:
    return tuple(_mask(name, f"{field}[{number}]") for number, name in enumerate(names))


def _bare(name: str) -> str:
    return name.upper().removeprefix("CAP_")


def mask_named(name: str) -> int:
    """Return the bit of a name, or `ALL`. Raises InvalidSpec, without a field: check names first."""
    return _mask(name, "")


def _mask(name: str, field: str) -> int:
    """Return the bit of a name, or `ALL`. Case and a CAP_ prefix do not matter. Raises InvalidSpec."""
    bare = _bare(name)
    if bare == "ALL":
        return ALL
    if bare not in _BITS:
        raise InvalidSpec(field, f"{name!r} is not a capability", "ALL or a name such as NET_ADMIN")
    return _BITS[bare]
