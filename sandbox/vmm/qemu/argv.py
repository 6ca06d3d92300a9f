"""The command line of a QEMU that runs a pod, worked out from values alone.

Pure and pinned by golden files: what a VM is made of can be read, reviewed and compared there.
QEMU gets every file, socket and tap as an inherited descriptor, so it needs to open nothing, may be
an unprivileged user, and the paths of the host are none of its business.

A VM that continues a template (`spec.template`) has the same devices in the same places as the one
that was saved, with two differences: it needs no kernel, and its shares are not there yet, as QEMU
before 8.2 cannot save a VM with them. They are plugged into the ports that are kept free for that.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sandbox.errors import InvalidSpec
from sandbox.spec import Value
from sandbox.vmm import VmSpec

CHANNEL_PORT = "husk.0"
GROWING = "growing"  # the device that memory is given by
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
    "memhp_default_state=online",
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

    monitor: int
    console: int
    channel: int
    kernel: int = -1  # with `initramfs`: to boot from
    initramfs: int = -1
    ram: int = -1  # the file that is the guest's RAM; -1: memory that QEMU makes
    shares: Mapping[str, int] = {}  # by tag: connected to the share's virtiofsd
    nics: tuple[NicFds, ...] = ()

    def all(self) -> tuple[int, ...]:
        single = (self.monitor, self.console, self.channel, self.kernel, self.initramfs, self.ram)
        nics = (fd for nic in self.nics for fd in (nic.tap, nic.vhost))
        return tuple(fd for fd in (*single, *self.shares.values(), *nics) if fd >= 0)


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
        *_memory(spec, fds),
        *_boot(spec, fds),
        *_channels(fds),
        *_ports(spec),
    ]
    for tag, fd in fds.shares.items():
        argv += ["-chardev", f"socket,id=fs-{tag},fd={fd}"]
        if not spec.template:
            argv += ["-device", _written(share_device(tag))]
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
    if spec.template and len(spec.shares) > spec.ports:
        raise InvalidSpec("ports", f"{spec.ports} are too few for what is plugged in", f"{len(spec.shares)}")


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
        *("-smp", _cpus(spec)),
    ]


def _cpus(spec: VmSpec) -> str:
    """Under KVM those that are given later are plugged in then. Kernels since 6.9 that run on no hypervisor
    they know of, and emulation is none, reckon with no CPU that is not there yet: so all are there, the
    kernel is told to leave the others alone (`maxcpus=`), and the agent wakes them."""
    most = max(spec.vcpus, spec.max_vcpus)
    return f"{spec.vcpus},maxcpus={most}" if spec.accelerator == "kvm" else f"{most}"


def _memory(spec: VmSpec, fds: Fds) -> list[str]:
    """Shared, because virtiofsd reads and writes it; what the guest frees goes back to the host.

    Memory that is given later is a device (virtio-mem), which hands out parts of a range that is
    there from the start and takes nothing as long as nothing is given.
    """
    size = f"size={spec.memory_mib}M,share=on"
    if fds.ram >= 0:
        backend = f"memory-backend-file,id=ram,{size},mem-path=/proc/self/fd/{fds.ram}"
    else:
        backend = f"memory-backend-memfd,id=ram,{size}"
    more = spec.max_memory_mib - spec.memory_mib
    if more <= 0:
        grow = ["-m", f"{spec.memory_mib}M"]
    else:
        grow = [
            *("-m", f"{spec.memory_mib}M,maxmem={spec.max_memory_mib}M"),
            *("-object", f"memory-backend-memfd,id=more,size={more}M,share=on,reserve=off"),
            *("-device", f"virtio-mem-pci,id={GROWING},memdev=more,requested-size=0"),
        ]
    return [*grow, "-object", backend, "-device", "virtio-balloon-pci,free-page-reporting=on"]


def _boot(spec: VmSpec, fds: Fds) -> list[str]:
    if spec.template:
        # what the kernel was read from is in its RAM; -no-reboot sees to it that it never boots again
        return ["-bios", "qboot.rom", "-incoming", "defer"]
    extra = (*_TCG_KERNEL_ARGS, f"maxcpus={spec.vcpus}") if spec.accelerator == "tcg" else ()
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


def _ports(spec: VmSpec) -> list[str]:
    """Where devices are plugged in: each port takes one."""
    device = "pcie-root-port,id={port},chassis={number},addr={slot}.{function}"
    if spec.ports:
        # eight to a slot, in slots of their own: what else there is keeps its place, however many they are
        device += ",multifunction=on"
    return [
        part
        for number in range(spec.ports)
        for part in (
            "-device",
            device.format(
                port=port_name(number), number=number + 1, slot=hex(0x10 + number // 8), function=number % 8
            ),
        )
    ]


def port_name(number: int) -> str:
    return f"port{number}"


def share_device(tag: str) -> dict[str, object]:
    """The device of a share, as -device and device_add take it."""
    return {"driver": "vhost-user-fs-pci", "chardev": f"fs-{tag}", "tag": tag, "queue-size": 1024}


def nic_device(number: int, mac: str, mtu: int) -> dict[str, object]:
    """The device of a NIC whose other end is `netNUMBER`."""
    device: dict[str, object] = {"driver": "virtio-net-pci", "netdev": f"net{number}", "mac": mac}
    return device | ({"host_mtu": mtu} if mtu else {}) | {"romfile": ""}


def _nic(number: int, mac: str, mtu: int, fds: NicFds) -> list[str]:
    vhost = f",vhost=on,vhostfd={fds.vhost}" if fds.vhost >= 0 else ""
    return [
        *("-netdev", f"tap,id=net{number},fd={fds.tap}{vhost}"),
        *("-device", _written(nic_device(number, mac, mtu))),
    ]


def _written(device: Mapping[str, object]) -> str:
    """As -device has it: the driver's name first and alone."""
    return ",".join([str(device["driver"]), *(f"{k}={v}" for k, v in device.items() if k != "driver")])
