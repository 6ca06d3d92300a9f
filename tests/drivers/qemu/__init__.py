"""The contract suite's kit for QEMU, whose driver is sandbox.vmm.qemu."""
