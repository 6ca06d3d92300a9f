"""The command line of a QEMU that runs a pod, worked out from values alone.

Pure and pinned by golden files: what a VM is made of can be read, reviewed and compared there.
QEMU gets every file, socket and tap as an inherited descriptor, so it needs to open nothing, may be
an unprivileged user, and the paths of the host are none of its business.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sandbox.errors import InvalidSpec
from sandbox.spec import Value
from sandbox.vmm import VmSpec

CHANNEL_PORT = "husk.0"
ACCELERATORS = ("kvm", "tcg")

# What every guest is told. A panic or a reboot ends the VM (with -no-reboot) instead of a second
# boot that nobody asked for; the rest only saves time: probing a clock that is known to be good,
# self-tests of ciphers, serial ports that do not exist, and waiting for grace periods.
_KERNEL_ARGS = (
    "console=ttyS0",
    "quiet",
    "panic=-1",
    "reboot=t",
    "random.trust_cpu=on",
    "tsc=reliable",
    "no_timer_check",
    "cryptomgr.notests",
    "rcupdate.rcu_expedited=1",
    "8250.nr_uarts=1",
    f"husk.channel=serial:{CHANNEL_PORT}",
)
# Emulation has no speculation to guard against; under KVM the guest decides for itself. A single CPU
# gains nothing there from having its lock prefixes patched out, which takes a tenth of the boot.
_TCG_KERNEL_ARGS = ("mitigations=off", "noreplace-smp")


class NicFds(msgspec.Struct, frozen=True, kw_only=True):
    tap: int
    vhost: int = -1  # of /dev/vhost-net; -1: packets go through QEMU


class Fds(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors that QEMU inherits: files open for reading, sockets listening unless said."""

    kernel: int
    initramfs: int
    monitor: int
    console: int
    channel: int
    shares: Mapping[str, int]  # by tag: connected to the share's virtiofsd
    nics: tuple[NicFds, ...] = ()

    def all(self) -> tuple[int, ...]:
        fixed = (self.kernel, self.initramfs, self.monitor, self.console, self.channel)
        nics = tuple(fd for nic in self.nics for fd in (nic.tap, nic.vhost) if fd >= 0)
        return (*fixed, *self.shares.values(), *nics)


class LaunchPlan(Value, frozen=True, kw_only=True):
    argv: tuple[str, ...]
    pass_fds: tuple[int, ...]


def plan(program: str, spec: VmSpec, fds: Fds) -> LaunchPlan:
    """How to run `spec`. Raises InvalidSpec for what QEMU could not be asked for safely."""
    check(spec)
    argv = [
        program,
        *("-name", process_name(spec.pod_id)),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *_machine(spec),
        *_memory(spec),
        *_boot(spec, fds),
        *_channels(fds),
    ]
    for tag, fd in fds.shares.items():
        argv += _share(tag, fd)
    for number, (nic, nic_fds) in enumerate(zip(spec.nics, fds.nics, strict=True)):
        argv += _nic(number, nic.mac, nic.mtu, nic_fds)
    # spawn: no child processes. elevateprivileges: no set-user-id. resourcecontrol: no scheduler games.
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    return LaunchPlan(argv=tuple(argv), pass_fds=fds.all())


def process_name(pod_id: str) -> str:
    return f"husk-{pod_id}"


def check(spec: VmSpec) -> None:
    """QEMU's options are separated by commas, so none may come in with a value."""
    if spec.accelerator not in ACCELERATORS:
        raise InvalidSpec("accelerator", f"{spec.accelerator!r} is not known", " or ".join(ACCELERATORS))
    for field, text in (
        ("machine", spec.machine),
        ("pod_id", spec.pod_id),
        ("cpu", (spec.cpu or "default").replace(",", "").replace("=", "")),
        *(("share", share.tag) for share in spec.shares),
        *(("mac", nic.mac) for nic in spec.nics),
    ):
        if not text or not all(c.isascii() and (c.isalnum() or c in "-_.:") for c in text):
            raise InvalidSpec(field, f"{text!r} cannot be given to QEMU", "letters, digits and -_.:")
    if spec.memory_mib < 64 or spec.vcpus < 1:
        raise InvalidSpec("size", f"{spec.memory_mib} MiB and {spec.vcpus} CPUs", "64 MiB and 1 CPU at least")


def _machine(spec: VmSpec) -> list[str]:
    """A q35 without what a pod has no use for; each thing left out is one less to attack and probe."""
    off = ("sata", "usb", "vmport", "smbus", "hpet", "i8042")
    devices = ",".join(f"{name}=off" for name in off)
    if spec.accelerator == "kvm":
        accelerator, cpu = "kvm", "host"
    else:
        # All that emulation can do, as images may be built for newer CPUs; a fifth level of page
        # tables only makes each walk longer. A CPU that says that its byte-wise string instructions
        # are quick makes the kernel clear and copy pages with them, and emulated they go byte by byte:
        # without the promise, memory is zeroed 5 times and files are read 3 times as fast.
        # The bound on translated code bounds resident memory.
        accelerator, cpu = "tcg,thread=multi,tb-size=128", "max,la57=off,erms=off,fsrm=off"
    return [
        *("-machine", f"{spec.machine},memory-backend=ram,{devices}"),
        *("-accel", accelerator),
        *("-cpu", spec.cpu or cpu),
        *("-smp", str(spec.vcpus)),
    ]


def _memory(spec: VmSpec) -> list[str]:
    """Shared, because virtiofsd reads and writes it; what the guest frees goes back to the host."""
    return [
        *("-m", f"{spec.memory_mib}M"),
        *("-object", f"memory-backend-memfd,id=ram,size={spec.memory_mib}M,share=on"),
        *("-device", "virtio-balloon-pci,free-page-reporting=on"),
    ]


def _boot(spec: VmSpec, fds: Fds) -> list[str]:
    extra = _TCG_KERNEL_ARGS if spec.accelerator == "tcg" else ()
    return [
        *("-bios", "qboot.rom"),
        *("-kernel", f"/proc/self/fd/{fds.kernel}"),
        *("-initrd", f"/proc/self/fd/{fds.initramfs}"),
        *("-append", " ".join((*_KERNEL_ARGS, *extra, *spec.kernel_args))),
    ]


def _channels(fds: Fds) -> list[str]:
    def listening(name: str, fd: int) -> tuple[str, str]:
        return "-chardev", f"socket,id={name},fd={fd},server=on,wait=off"

    return [
        *listening("monitor", fds.monitor),
        *("-mon", "chardev=monitor,mode=control"),
        *listening("console", fds.console),
        *("-serial", "chardev:console"),
        *listening("channel", fds.channel),
        *("-device", "virtio-serial-pci,id=serial,max_ports=2"),
        *("-device", f"virtserialport,bus=serial.0,chardev=channel,name={CHANNEL_PORT}"),
    ]


def _share(tag: str, fd: int) -> list[str]:
    return [
        *("-chardev", f"socket,id=fs-{tag},fd={fd}"),
        *("-device", f"vhost-user-fs-pci,chardev=fs-{tag},tag={tag},queue-size=1024"),
    ]


def _nic(number: int, mac: str, mtu: int, fds: NicFds) -> list[str]:
    vhost = f",vhost=on,vhostfd={fds.vhost}" if fds.vhost >= 0 else ""
    device = f"virtio-net-pci,netdev=net{number},mac={mac},host_mtu={mtu},romfile="
    return ["-netdev", f"tap,id=net{number},fd={fds.tap}{vhost}", "-device", device]
