"""A VM in which VMs run under KVM, on a host that has none: QEMU also emulates AMD's virtualisation (SVM).

    python -m tests.nested.outer SHARED TIMEOUT_S COMMAND...

runs a command in it and exits with its status. Husk's QEMU driver starts the VM. Its root is the host's root
file system over virtio-fs, under an overlay whose upper directory is in memory, so all changes are lost at
its end. Kernel and modules come from the package that guest images are made of. Unlike some hosts it has
/dev/vhost-net, /dev/vhost-vsock, AppArmor, and only cgroup v2.

KVM does without nested paging there. With it, QEMU's emulation (7.2) now and then goes on in one kernel with
registers of the other, and one of them panics.

    SHARED/start       the first process, seen inside as /nested/start
    SHARED/{lib,usr}   the kernel's modules
    SHARED/output      what the command printed
    SHARED/status      its exit status
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sandbox.guest_image.vmlinux import Kernel
from sandbox.host import cgroup, mount_flags, mounts, process, syscalls
from sandbox.vmm import Machine, ShareSpec, VmSpec
from sandbox.vmm.drivers import find_hypervisor
from tests.kit.guest import fetch_kernel, make_image
from tests.kit.scratch import scratch_dir, scratch_root

MEMORY_MIB = 3072
VCPUS = 2
MODULES = ("virtio_pci", "virtiofs", "overlay")
INIT = """\
set -e
mkdir -p /lower /upper /root
mount -t virtiofs -o ro host /lower
mount -t tmpfs upper /upper
mkdir /upper/upper /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work root /root
mkdir -p /root/nested
mount -t virtiofs nested /root/nested
for each in dev proc sys; do mount --move /$each /root/$each; done
exec switch_root /root /nested/start
"""
START = """\
#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mkdir /tree
mount --bind {directory} /tree
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir -p {directory}
mount --bind /tree {directory}
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /dev/shm /usr/lib/modules
mount -t tmpfs tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
ln -sfn /nested/lib/modules/{version} /usr/lib/modules/{version}
ip link set lo up
modprobe kvm-amd npt=0
modprobe -a vhost_net vhost_vsock vsock_loopback tun
cd {directory}
{command} >/nested/output 2>&1
echo $? >/nested/status
poweroff -f
"""


async def run(shared: Path, command: Sequence[str], timeout_s: float) -> int:
    """Run the command and return its exit status. Raises AssertionError with the console if there is none."""
    run_dir = scratch_dir("outer")
    kernel = await prepare(shared, run_dir, command)
    vmlinux, initramfs = make_image(run_dir, kernel, INIT, MODULES)
    pod_id = f"outer{secrets.token_hex(6)}"
    groups = cgroup.find_cgroups(f"/{scratch_root().name}")
    root = bind_root(run_dir / "host")
    spec = VmSpec(
        pod_id=pod_id,
        run_dir=str(run_dir),
        kernel=str(vmlinux),
        initramfs=str(initramfs),
        accelerator="tcg",
        memory_mib=MEMORY_MIB,
        vcpus=VCPUS,
        shares=(
            ShareSpec(tag="host", source=str(root), cache="always"),
            ShareSpec(tag="nested", source=str(shared), cache="auto"),
        ),
        cgroups=groups.directories(pod_id, ""),
    )
    hypervisor = find_hypervisor("qemu")
    try:
        groups.create(pod_id, "")
        machine = await hypervisor.start(spec, ())
        try:
            return await until_done(shared, machine, timeout_s)
        finally:
            await machine.close()
    finally:
        await hypervisor.destroy(pod_id, run_dir)
        groups.remove(pod_id, "")


async def prepare(shared: Path, scratch: Path, command: Sequence[str]) -> Kernel:
    """Fill `shared`, and return the kernel with its modules there."""
    kernel = await fetch_kernel(scratch)
    modules = shared / "lib/modules" / kernel.version
    modules.parent.mkdir(parents=True)
    kernel.modules.rename(modules)
    (shared / "usr").mkdir()
    (shared / "usr/lib").symlink_to("../lib")  # some versions of depmod read that directory
    done = await process.run(["depmod", "-b", str(shared), kernel.version], timeout_s=60)
    assert done.status == 0, done.stderr
    start = shared / "start"
    words = {
        "version": kernel.version,
        "directory": shlex.quote(str(Path.cwd())),
        "command": shlex.join(command),
    }
    start.write_text(START.format(**words))
    start.chmod(0o755)
    return Kernel(image=kernel.image, modules=modules)


def leave_mounts() -> None:
    """Enter a new mount namespace, so that no clean-up of the run reaches the host's files."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.set_propagation(Path("/"), mount_flags.MS_REC | mount_flags.MS_PRIVATE)


def bind_root(at: Path) -> Path:
    """Bind the root file system to `at`, read-only, as virtiofsd cannot export "/" itself."""
    at.mkdir()
    mounts.bind(Path("/"), at, recursive=False)
    mounts.make_readonly(at)
    return at


async def until_done(shared: Path, machine: Machine, timeout_s: float) -> int:
    with contextlib.suppress(TimeoutError):  # the status or the console is reported instead
        async with asyncio.timeout(timeout_s):
            await machine.wait()
    status = shared / "status"
    assert status.exists(), f"the outer VM did not finish within {timeout_s:g} s:\n{machine.console_tail()}"
    return int(status.read_text())


if __name__ == "__main__":
    leave_mounts()  # while there is one thread
    sys.exit(asyncio.run(run(Path(sys.argv[1]), sys.argv[3:], float(sys.argv[2]))))
