"""Hypervisor drivers that exist only in the tests, and what the contract suite needs to test each driver.

A folder here is named after a driver. It has a module `kit` for the contract suite (see `Kit`), also for
Husk's own drivers. A driver that exists only here is the folder itself, found as an installed package
would be: by an entry point, in the folder's `metadata/NAME.dist-info/entry_points.txt`. Nothing outside
the folder names it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Protocol, cast

from cri.config import HandlerTable
from sandbox.host.process import ProcessIdentity
from sandbox.vmm import VmHandle, VmSpec

FOLDER = Path(__file__).parent


class Kit(Protocol):
    """What the contract suite has to know about a driver: the module `kit` of its folder."""

    ACCELERATOR: str  # one that works everywhere
    UNKNOWN_OPTIONS: dict[str, str]  # options that `start` refuses with InvalidSpec
    PODS_BOOT_IMAGE: bool  # its pods boot the guest image, so tests/vm tests their life

    def make_guest(self, directory: Path, line: str, then: str) -> VmSpec:
        """Make a guest that prints `line` on its console: with `then` "repeat" several times a second as
        long as it runs, with "reset" once before it ends its VM. Called again, it replaces that guest.

        Returns a VmSpec whose kernel, initramfs and options are set.
        """

    def pod_handler(self) -> HandlerTable:
        """Return the configuration of a handler whose pods run without a guest image. Not called where they
        need one (PODS_BOOT_IMAGE)."""

    def helpers(self, spec: VmSpec) -> Collection[str]:
        """Return the names in VmHandle.helpers of a VM with this spec."""

    def check_confinement(self, handle: VmHandle) -> None:
        """Assert that the VMM has no more privileges than the driver promises."""

    def network_process(self, handle: VmHandle) -> ProcessIdentity:
        """Return the process that runs in VmSpec.netns and holds the taps."""


def find_kit(name: str) -> Kit:
    """Return the kit of a driver, which must have one."""
    return cast(Kit, importlib.import_module(f"{__name__}.{name}.kit"))


def register() -> None:
    """Let importlib.metadata find the entry points of the drivers here. Idempotent."""
    for metadata in sorted(FOLDER.glob("*/metadata")):
        if str(metadata) not in sys.path:
            sys.path.append(str(metadata))


register()
