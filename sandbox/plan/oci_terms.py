"""How the OCI runtime specification (config.md, config-linux.md) says what a plan has as numbers. Pure."""

from __future__ import annotations

import stat

from sandbox.capabilities import ALL, NAMES
from sandbox.plan import mounts
from sandbox.plan.values import ProcessPlan

Json = dict[str, object]

VERSION = "1.0.2"
_MOUNT_OPTIONS = {
    mounts.MS_RDONLY: "ro",
    mounts.MS_NOSUID: "nosuid",
    mounts.MS_NODEV: "nodev",
    mounts.MS_NOEXEC: "noexec",
    mounts.MS_STRICTATIME: "strictatime",
}
PROPAGATIONS = {mounts.MS_PRIVATE: "private", mounts.MS_SLAVE: "slave", mounts.MS_SHARED: "shared"}


def mount_options(flags: int) -> list[str]:
    return [name for bit, name in _MOUNT_OPTIONS.items() if flags & bit]


def device_type(mode: int) -> str:
    return "b" if stat.S_ISBLK(mode) else "c"


def capability_sets(process: ProcessPlan, within: int = ALL) -> dict[str, list[str]]:
    sets = {
        "bounding": process.cap_bounding,
        "permitted": process.cap_permitted,
        "effective": process.cap_effective,
        "inheritable": process.cap_inheritable,
        "ambient": process.cap_ambient,
    }
    return {kind: _names(mask & within) for kind, mask in sets.items()}


def _names(mask: int) -> list[str]:
    return [f"CAP_{name}" for number, name in enumerate(NAMES) if mask >> number & 1]
