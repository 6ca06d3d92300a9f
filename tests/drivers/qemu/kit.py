"""QEMU with a guest of a few bytes: see `tests.kit.tinykernel`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sandbox.host.process import ProcessIdentity
from sandbox.vmm import VmHandle, VmSpec
from tests.kit.tinykernel import make_kernel

ACCELERATOR = "tcg"
UNKNOWN_OPTIONS = {"bios": "seabios"}
PODS_BOOT_IMAGE = True


def make_guest(directory: Path, line: str, then: str) -> VmSpec:
    """See Kit."""
    kernel, initramfs = directory / "kernel", directory / "initramfs"
    kernel.write_bytes(make_kernel(line, then=then))
    initramfs.write_bytes(b"")
    return VmSpec(
        pod_id="",
        run_dir="",
        kernel=str(kernel),
        initramfs=str(initramfs),
        accelerator=ACCELERATOR,
        memory_mib=64,
        vcpus=1,
    )


def helpers(spec: VmSpec) -> Collection[str]:
    """See Kit: a virtiofsd for each share."""
    return {share.tag for share in spec.shares}


def check_confinement(handle: VmHandle) -> None:
    """See Kit: an unprivileged user, no capabilities, seccomp filters."""
    status = Path(f"/proc/{handle.vmm.pid}/status").read_text()
    assert "CapEff:\t" + "0" * 16 in status and "Seccomp:\t2" in status and "Uid:\t0\t" not in status


def network_process(handle: VmHandle) -> ProcessIdentity:
    """See Kit."""
    return handle.vmm
