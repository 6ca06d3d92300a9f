"""The hypervisor driver for QEMU: see `driver` for how VMs are run, `host` for what it needs of the host."""

from __future__ import annotations

from pathlib import Path

from sandbox.vmm import Host, Hypervisor


def make() -> Hypervisor:
    """Return the driver."""
    from sandbox.vmm.qemu.driver import Qemu  # it loads a QMP client, which most commands do not need

    return Qemu()


def make_host(fs: Path = Path("/")) -> Host:
    """Return what the driver needs of the machine whose root directory is `fs`."""
    from sandbox.vmm.qemu.host import QemuHost

    return QemuHost(fs)
