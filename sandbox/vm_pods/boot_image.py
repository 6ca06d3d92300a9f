"""The guest image as the daemon finds it: what a VM boots, built by `husk guest build`.

    ROOT/guest/HASH/{vmlinux,initramfs,image.json,modules/[,apparmor]}
    ROOT/guest/current -> HASH     the image that new pods get

An image never changes: HASH is taken of its content. `current` is replaced atomically by a build,
also while the daemon runs (see `guest_image.build`).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import msgspec

ACL_MODULE = "husk_acl"  # makes the guest's kernel enforce ACLs on volumes (see `guest_image.acl_module`)
MODULES_DIRECTORY = "modules"


class GuestImage(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel and an initramfs that belong together; `hash` identifies their content."""

    kernel: Path
    initramfs: Path
    hash: str
    kernel_version: str
    modules: tuple[str, ...] = ()  # that are loaded at boot


class ImageFacts(msgspec.Struct, frozen=True):
    """The content of image.json."""

    kernel_version: str
    modules: tuple[str, ...]


def find_image(root: Path) -> GuestImage | None:
    """Return the image that new pods get; None before the first build. Cheap: cached by hash."""
    guest = f"{root}/guest"  # not a Path: every start of a pod asks several times
    try:
        name = os.readlink(f"{guest}/current")  # noqa: PTH115
        os.stat(f"{guest}/{name}/image.json")  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _read_image(guest, name)


@functools.lru_cache(maxsize=8)
def _read_image(guest: str, name: str) -> GuestImage:
    """Read the description of an image that exists. May be cached: its content is its name."""
    directory = Path(guest, name).resolve()
    facts = msgspec.json.decode((directory / "image.json").read_bytes(), type=ImageFacts)
    return GuestImage(
        kernel=directory / "vmlinux",
        initramfs=directory / "initramfs",
        hash=directory.name,
        kernel_version=facts.kernel_version,
        modules=facts.modules,
    )


def modules_of(kernel: str) -> Path | None:
    """Return the directory of the modules that a guest with this kernel loads on demand, if it has one."""
    modules = Path(kernel).with_name(MODULES_DIRECTORY)
    return modules if (modules / "aliases").exists() else None


def default_profile(root: Path) -> Path:
    """Return the path of AppArmor's compiled RuntimeDefault profile for new pods. It may not exist."""
    return root / "guest" / "current" / "apparmor"
