"""A hypervisor driver without a VM: the guest agent runs as an ordinary process of the host.

It proves that the seam fits more than QEMU, and serves tests of pods that need no VM. There is no
isolation worth the name: containers run on the host's kernel, in the agent's namespaces.
"""

from __future__ import annotations

from pathlib import Path

from sandbox.vmm import Host, Hypervisor
from tests.drivers.process.driver import ProcessDriver
from tests.drivers.process.host import ProcessHost


def make() -> Hypervisor:
    """Return the driver."""
    return ProcessDriver()


def make_host(fs: Path = Path("/")) -> Host:
    """Return what the driver needs of the host, which is nothing."""
    return ProcessHost()
