"""What a container is given, and the RuntimeDefault profile.

The VM is the fence. Inside of it that profile keeps a container, also its root, from the guest's kernel:
no mounts, no writing to what /proc and /sys show of the whole system. Control groups, the sysctls of
namespaces and everything that belongs to processes are left to how they are mounted. Pure.
"""

from __future__ import annotations

import msgspec

NAME = "husk-default"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Compiled, and the profile of it that is entered."""

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
