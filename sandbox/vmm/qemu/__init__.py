"""The hypervisor driver for QEMU."""

from sandbox.vmm.qemu.driver import make

__all__ = ["make"]
