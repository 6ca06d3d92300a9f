"""The compiler of plans: from a client's specification to what the agent, or crun, carries out.

    values      what a plan is; `encode` turns it into the agent's messages, `oci` into an OCI configuration
    container   a container, made of the parts below
    process     argv, environment, ids, capabilities and limits of a process
    users       ids of a process, from the image's passwd and group files
    mounts      what is mounted where, in order
    devices     device nodes; `device_filter`: which devices the container's cgroup allows
    resources   limits, as files of cgroup v2
    cdi         devices that are named by Container Device Interface
    pod_files   hosts, hostname and resolv.conf
    configure   a pod: its identity, sysctls and network
    size, vm    the VM of a pod, and of a handler

Pure: no clock, files or event loop, so a plan is a function of its arguments, and golden tests pin it
(tests/golden/plan). An error in a request is found here and raised as InvalidSpec with the field,
before anything is made. What a plan needs of the node (files of images, devices, CDI specifications, the
seccomp profile) is read by `steps` and passed in.
"""

from sandbox.plan.configure import compile_identity, compile_network
from sandbox.plan.container import compile_container, limited
from sandbox.plan.device_filter import device_filter_for
from sandbox.plan.mounts import MountSource
from sandbox.plan.process import compile_exec
from sandbox.plan.resources import compile_resources
from sandbox.plan.signals import resolve_stop_signal, signal_number
from sandbox.plan.size import HUGE_PAGE_MIB, grown_size, huge_mib, vm_size

__all__ = [
    "HUGE_PAGE_MIB",
    "MountSource",
    "compile_container",
    "compile_exec",
    "compile_identity",
    "compile_network",
    "compile_resources",
    "device_filter_for",
    "grown_size",
    "huge_mib",
    "limited",
    "resolve_stop_signal",
    "signal_number",
    "vm_size",
]
