"""VMs for tests: the distribution's kernel with a shell script as its first process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sandbox.guest_image import build, cpio
from sandbox.guest_image import vmlinux as vmlinux_module
from sandbox.guest_image.vmlinux import Kernel

BUSYBOX = Path("/usr/bin/busybox")  # busybox-static
# beginning of each script: commands, devices, and the modules of the image
PRELUDE = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev; mount -t sysfs sys /sys; mount -t proc proc /proc
while read m; do insmod /modules/$m; done </modules/order
"""


async def fetch_kernel(directory: Path) -> Kernel:
    """Return the newest kernel, unpacked in `directory`. Its package may be cached by the guest image."""
    cache = os.environ.get("HUSK_TEST_GUEST", "")
    packages = Path(cache, "packages") if cache else directory / "packages"
    return await build.fetch_kernel(packages, directory, print)


def make_image(
    directory: Path, kernel: Kernel, init: str, modules: Sequence[str] = build.MODULES
) -> tuple[Path, Path]:
    """Make vmlinux and an initramfs whose /init is PRELUDE followed by `init`, and return their paths."""
    vmlinux = directory / "vmlinux"
    vmlinux.write_bytes(vmlinux_module.extract_vmlinux(kernel.image.read_bytes()))
    loaded = vmlinux_module.load_modules(
        vmlinux_module.find_modules(kernel.modules), vmlinux_module.read_builtin(kernel.modules), modules
    )
    archive = build.make_initramfs((PRELUDE + init).encode(), loaded)
    tools = cpio.write_archive(
        [
            cpio.directory("bin"),
            cpio.file("bin/busybox", BUSYBOX.read_bytes(), 0o755),
            # in place of /init, which is not the agent here
            cpio.symbolic_link(build.MODPROBE, "/bin/busybox"),
        ]
    )
    (directory / "initramfs").write_bytes(archive + tools)  # the kernel takes archives in a row
    return vmlinux, directory / "initramfs"
