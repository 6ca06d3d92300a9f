"""The command line of a QEMU that runs a pod, computed from values alone.

Pure and pinned by golden files, where what a VM is made of can be read, reviewed and compared.
QEMU gets every file, socket and tap as an inherited descriptor: it opens nothing by name, so it can
run as an unprivileged user, and no path of the host reaches it.

A VM that is restored from a template (`spec.template`) has the same devices in the same slots as the one
that was saved, with two differences: it needs no kernel, and its shares are missing, as QEMU before 8.2
cannot migrate a VM with vhost-user-fs devices. They are hot-plugged, as other devices are (see `devices`).

The driver's own options (VmSpec.options):

    machine   the machine type, `-machine`; "q35" without it
    cpu       the CPU model, `-cpu`; without it "host" under KVM, and "max" less some features under TCG
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sandbox.errors import InvalidSpec
from sandbox.spec import Value
from sandbox.vmm import VmSpec

NAME = "qemu"  # of the driver, in handles and facts
CHANNEL_PORT = "husk.0"
GROWING = "growing"  # id of the virtio-mem device
ACCELERATORS = ("kvm", "tcg")
OPTIONS = ("machine", "cpu")
DEFAULT_MACHINE = "q35"
# The bus of hot-plugged devices, with 32 slots. The first is the channel's: without a device at boot, the
# guest's kernel would give the bus no memory; with one, it gives a MiB of each kind, enough for all slots.
PLUG_BUS = "plug"
SLOTS = 31
MAX_SHARES = 3  # with one that is added

# Kernel arguments of every guest. A panic or a reboot ends the VM (with -no-reboot) instead of booting
# again; the rest saves time: probing a clock that is known to be good, self-tests of ciphers, serial
# ports that do not exist, and waiting for RCU grace periods.
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
# Emulation does not speculate, so there is nothing to mitigate; under KVM the guest decides for itself. A
# single CPU gains nothing there from having its lock prefixes patched out, which takes a tenth of the boot.
_TCG_KERNEL_ARGS = ("mitigations=off", "noreplace-smp")


class NicFds(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors of one network interface."""

    tap: int
    vhost: int = -1  # of /dev/vhost-net; -1: packets go through QEMU


class Fds(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors that QEMU inherits: files open for reading and sockets listening, unless said otherwise."""

    monitor: int
    console: int
    channel: int
    kernel: int = -1  # with `initramfs`: to boot from
    initramfs: int = -1
    ram: int = -1  # the file that holds the guest's RAM; -1: QEMU allocates it
    shares: Mapping[str, int] = {}  # by tag: connected to the share's virtiofsd
    nics: tuple[NicFds, ...] = ()

    def all(self) -> tuple[int, ...]:
        """Return every descriptor, in no particular order."""
        single = (self.monitor, self.console, self.channel, self.kernel, self.initramfs, self.ram)
        nics = (fd for nic in self.nics for fd in (nic.tap, nic.vhost))
        return tuple(fd for fd in (*single, *self.shares.values(), *nics) if fd >= 0)


class LaunchPlan(Value, frozen=True, kw_only=True):
    """A command line and the descriptors that it mentions."""

    argv: tuple[str, ...]
    pass_fds: tuple[int, ...]


def plan(program: str, spec: VmSpec, fds: Fds) -> LaunchPlan:
    """Return how to run `spec`. Raises InvalidSpec for values that could not be passed to QEMU safely."""
    check(spec)
    argv = [
        program,
        *("-name", process_name(spec.pod_id)),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *_machine(spec),
        *_memory(spec, fds),
        *_boot(spec, fds),
        *("-device", f"pcie-pci-bridge,id={PLUG_BUS},addr=0x10"),
        *_channels(fds),
    ]
    for tag, fd in fds.shares.items():
        argv += ["-chardev", f"socket,id=fs-{tag},fd={fd}"]
        if not spec.template:
            argv += ["-device", _written(share_device(tag))]
    for number, (nic, nic_fds) in enumerate(zip(spec.nics, fds.nics, strict=True)):
        argv += _nic(number, nic.mac, nic.mtu, nic_fds)
    # spawn: no child processes. elevateprivileges: no set-user-id. resourcecontrol: no change of scheduling.
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    return LaunchPlan(argv=tuple(argv), pass_fds=fds.all())


def process_name(pod_id: str) -> str:
    """Return the argument by which the processes of a pod are found."""
    return f"husk-{pod_id}"


# --------------------------------------------------------------------------------------- checks


def check_settings(accelerator: str, options: Mapping[str, str]) -> None:
    """Check an accelerator and options. Raises InvalidSpec."""
    if accelerator not in ACCELERATORS:
        raise InvalidSpec("accelerator", f"{accelerator!r} is unknown", " or ".join(ACCELERATORS))
    for name, value in options.items():
        if name not in OPTIONS:
            raise InvalidSpec(f"options.{name}", "is not an option of QEMU's driver", ", ".join(OPTIONS))
        # a CPU model is a list of features with values
        check_text(f"options.{name}", value.replace(",", "").replace("=", "") if name == "cpu" else value)


def check(spec: VmSpec) -> None:
    """Check that no value can smuggle in another option: QEMU separates options by commas.

    Raises InvalidSpec.
    """
    check_settings(spec.accelerator, spec.options)
    for field, text in (
        ("pod_id", spec.pod_id),
        *(("share", share.tag) for share in spec.shares),
        *(("mac", nic.mac) for nic in spec.nics),
    ):
        check_text(field, text)
    if spec.memory_mib < 64 or spec.vcpus < 1:
        raise InvalidSpec("size", f"{spec.memory_mib} MiB and {spec.vcpus} CPUs", "at least 64 MiB and 1 CPU")
    if len(spec.shares) > MAX_SHARES:
        raise InvalidSpec("shares", f"{len(spec.shares)} shares", f"at most {MAX_SHARES} of them")
    plugged = MAX_SHARES + max(0, spec.max_nics - 1) + spec.max_disks
    if plugged > SLOTS:
        raise InvalidSpec("max_disks", f"{plugged} devices to plug, with NICs and shares", f"at most {SLOTS}")


def check_text(field: str, text: str) -> None:
    """Check that a value can be a part of an option. Raises InvalidSpec."""
    if not text or not all(c.isascii() and (c.isalnum() or c in "-_.:") for c in text):
        raise InvalidSpec(field, f"{text!r} cannot be passed to QEMU", "letters, digits and -_.:")


# -------------------------------------------------------------------------------------- devices


def _machine(spec: VmSpec) -> list[str]:
    """A machine without the devices that no pod needs: each is something less to attack and to probe."""
    off = ("sata", "usb", "vmport", "smbus", "hpet", "i8042")
    devices = ",".join(f"{name}=off" for name in off)
    if spec.accelerator == "kvm":
        accelerator, cpu = "kvm", "host"
    else:
        # All that emulation can do, as images may be built for newer CPUs; a fifth level of page
        # tables only makes each translation longer. A CPU that advertises fast byte-wise string
        # instructions (erms, fsrm) makes the kernel clear and copy pages with them, and emulated they go
        # byte by byte: without them, memory is zeroed 5 times and files are read 3 times as fast.
        # tb-size bounds the cache of translated code, and with it resident memory.
        accelerator, cpu = "tcg,thread=multi,tb-size=128", "max,la57=off,erms=off,fsrm=off"
    machine = spec.options.get("machine", DEFAULT_MACHINE)
    return [
        *("-machine", f"{machine},memory-backend=ram,{devices}"),
        *("-accel", accelerator),
        *("-cpu", spec.options.get("cpu", cpu)),
        *("-smp", _cpus(spec)),
    ]


def _cpus(spec: VmSpec) -> str:
    """Under KVM, further CPUs are hot-plugged. Under TCG all exist from the start: kernels since 6.9 that
    detect no hypervisor (emulation is none) ignore CPUs that appear later. The guest's kernel leaves the
    others offline (`maxcpus=`), and the agent brings them online."""
    most = max(spec.vcpus, spec.max_vcpus)
    return f"{spec.vcpus},maxcpus={most}" if spec.accelerator == "kvm" else f"{most}"


def _memory(spec: VmSpec, fds: Fds) -> list[str]:
    """Shared, as virtiofsd reads and writes it; pages that the guest frees go back to the host.

    Memory added later comes from a virtio-mem device, which hands out parts of a range that is reserved
    from the start and costs nothing until it is used.
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
        # the kernel is in the restored RAM, and with -no-reboot it is never loaded again
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
        *("-device", f"virtio-serial-pci,id=serial,max_ports=2,bus={PLUG_BUS},addr=0,disable-legacy=on"),
        *("-device", f"virtserialport,bus=serial.0,chardev=channel,name={CHANNEL_PORT}"),
    ]


def share_device(tag: str) -> dict[str, object]:
    """Return a share's device as -device and device_add take it."""
    return {"driver": "vhost-user-fs-pci", "chardev": f"fs-{tag}", "tag": tag, "queue-size": 1024}


def nic_device(netdev: str, mac: str, mtu: int) -> dict[str, object]:
    """Return the device of a NIC whose other end is the netdev of this id."""
    device: dict[str, object] = {"driver": "virtio-net-pci", "netdev": netdev, "mac": mac}
    return device | ({"host_mtu": mtu} if mtu else {}) | {"romfile": ""}


def _nic(number: int, mac: str, mtu: int, fds: NicFds) -> list[str]:
    vhost = f",vhost=on,vhostfd={fds.vhost}" if fds.vhost >= 0 else ""
    return [
        *("-netdev", f"tap,id=net{number},fd={fds.tap}{vhost}"),
        *("-device", _written(nic_device(f"net{number}", mac, mtu))),
    ]


def _written(device: Mapping[str, object]) -> str:
    """The value of -device: the driver's name comes first, without a key."""
    return ",".join([str(device["driver"]), *(f"{k}={v}" for k, v in device.items() if k != "driver")])
