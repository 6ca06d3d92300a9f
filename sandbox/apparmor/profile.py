"""The RuntimeDefault profile, and what a policy is. Pure.

The VM isolates the pod. Inside of it this profile protects the guest's kernel from a container, also from
its root user: no mounts, and no writing to files of /proc and /sys that concern the whole system. Access to
cgroups, sysctls of namespaces and files of processes is left to how they are mounted.
"""

from __future__ import annotations

import msgspec

NAME = "husk-default"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled policy, and which of its profiles a container enters; both empty: unconfined."""

    profile: str = ""
    binary: bytes = b""


UNCONFINED = Policy()

PROFILE = f"""\
profile {NAME} flags=(attach_disconnected, mediate_deleted) {{
  capability,
  file,
  network,
  umount,

  # the agent's, and among the processes of the profile
  signal (receive) peer=unconfined,
  signal (send, receive) peer={NAME},
  ptrace (trace, tracedby, read, readby) peer={NAME},

  deny /proc/* w,
  deny /proc/{{acpi,asound,bus,driver,fs,irq,scsi,tty}}/** w,
  deny /proc/sys/{{abi,debug,dev,vm}}/** w,
  deny /proc/sys/fs/{{[^m]*,mount-max,[^m]*/**}} w,
  deny /proc/sys/kernel/{{[^ms]*,m[^s]*,s[^eh]*}}{{,/**}} w,
  deny /proc/{{kcore,kmem,mem,sysrq-trigger}} rwklx,

  deny /sys/{{block,bus,class,dev,devices,firmware,hypervisor,kernel,module,power}}/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/kernel/security/** rwklx,
}}
"""
