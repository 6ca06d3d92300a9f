"""What a pod of this engine runs in, by its record."""

from __future__ import annotations

from sandbox.pod import Pod
from sandbox.records import VmRuntime
from sandbox.vmm import VmHandle


def runtime_of(pod: Pod) -> VmRuntime:
    """Return the state of the pod's VM."""
    runtime = pod.record.runtime
    assert isinstance(runtime, VmRuntime), "the engine of VMs is given pods in VMs alone"
    return runtime


def handle_of(pod: Pod) -> VmHandle:
    """Return the handle of a VM that was started."""
    handle = runtime_of(pod).handle
    assert handle is not None, "the VM was started by an earlier step"
    return handle
