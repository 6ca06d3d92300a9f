"""The contract suite's guest: the agent in its standalone mode, started by a script that prints a line."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cri.config import HandlerTable
from sandbox.host.process import ProcessIdentity
from sandbox.vmm import VmHandle, VmSpec
from tests.kit.agent import build

ACCELERATOR = "none"
UNKNOWN_OPTIONS = {"machine": "q35"}
PODS_BOOT_IMAGE = False
SCRIPTS = {
    "repeat": """#!/bin/sh
echo "{line}"
(while sleep 0.05; do echo "{line}"; done) &
exec {agent} "$@"
""",
    "reset": """#!/bin/sh
echo "{line}"
exit 1
""",
}


def make_guest(directory: Path, line: str, then: str) -> VmSpec:
    """See Kit."""
    program = directory / "guest"
    program.write_text(SCRIPTS[then].format(line=line, agent=build("husk-agent")))
    program.chmod(0o755)
    return VmSpec(
        pod_id="",
        run_dir="",
        kernel=str(program),
        initramfs="",
        accelerator=ACCELERATOR,
        memory_mib=64,
        vcpus=1,
    )


def pod_handler() -> HandlerTable:
    """See Kit: the agent itself is the kernel. The initramfs is not read."""
    agent = str(build("husk-agent"))
    return HandlerTable(hypervisor="process", kernel=agent, initramfs=agent)


def helpers(spec: VmSpec) -> Collection[str]:
    """See Kit: the agent, and a wire for each NIC; shares are bind mounts."""
    return {"init", "agent", *(f"net{number}" for number in range(len(spec.nics)))}


def check_confinement(handle: VmHandle) -> None:
    """See Kit: nothing is promised but namespaces of the agent's own."""
    for kind in ("pid", "mnt", "net", "uts", "ipc"):
        ours, theirs = (
            Path(f"/proc/{each}/ns/{kind}").readlink() for each in ("self", handle.helpers["agent"].pid)
        )
        assert ours != theirs, kind


def network_process(handle: VmHandle) -> ProcessIdentity:
    """See Kit."""
    return handle.helpers["net0"]
