"""From what a client asked for to what the agent executes: every decision, none of the doing.

    start       a container: Start, with the parts below
    process     argv, environment, ids, capabilities, limits of a process
    mounts      what is mounted where, in order
    configure   a pod: names and all else that makes it itself; sysctls, network
    size        a VM: memory and CPUs

Pure: no clock, files or loop, so a plan is a function of its arguments and the golden tests pin it
(tests/golden/plan). Whatever is wrong with a request is found here, as InvalidSpec with the field,
before anything is made. What a plan needs of the node (files of images, devices, CDI specifications, the
seccomp profile) is read by `steps` and passed in.
"""

from sandbox.plan.configure import compile_identity, compile_network
from sandbox.plan.device_filter import device_filter_for
from sandbox.plan.mounts import MountSource
from sandbox.plan.process import compile_exec
from sandbox.plan.resources import compile_resources
from sandbox.plan.signals import resolve_stop_signal, signal_number
from sandbox.plan.size import HUGE_PAGE_MIB, grown_size, huge_mib, vm_size
from sandbox.plan.start import compile_start, limited

__all__ = [
    "HUGE_PAGE_MIB",
    "MountSource",
    "compile_exec",
    "compile_identity",
    "compile_network",
    "compile_resources",
    "compile_start",
    "device_filter_for",
    "grown_size",
    "huge_mib",
    "limited",
    "resolve_stop_signal",
    "signal_number",
    "vm_size",
]
