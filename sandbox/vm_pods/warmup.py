"""Warming up a pooled VM: it configures a network and runs a container, neither of which is any pod's.

Under emulation, code is translated when it first runs, in the guest's kernel as in the agent, and
translated code is not part of a saved VM: the first container of a restored VM starts three times as slowly
as the second, and configuring the network takes 100 ms. So a pooled VM does all of that once before it is
paused: it sets addresses and routes and removes them, and starts a container by the usual plan, runs an exec
in it and ends it. The program is the agent's own file, bound into an empty root, so no image is needed and
no file of the host is visible. Where code is not translated this costs a few milliseconds.

Afterwards nothing of it is left in the guest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from network.spec import Attachment, Interface, Route
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.guest.execs import run_exec
from sandbox.host import mount_flags
from sandbox.plan import compile_container, compile_exec, compile_identity, compile_network
from sandbox.plan.device_filter import device_filter_for
from sandbox.plan.encode import encode_configuration, encode_container, encode_process
from sandbox.plan.pod_files import PodFiles
from sandbox.plan.users import ResolvedUser
from sandbox.plan.values import ContainerPlan, Make, MountPlan
from sandbox.plan.vm import FIRST_MAC
from sandbox.seccomp import seccomp_for
from sandbox.spec import ContainerSpec, ImageDefaults, PodSpec, Seccomp, SeccompKind, SecuritySpec
from sandbox.steps.container import make_mount_points
from sandbox.steps.pod import remove_tree

NAME = "husk-warm"
NOBODY = 65534
TIMEOUT_S = 20.0
OUTPUT_LIMIT = 4096
PROGRAM = "/program"

# Documentation addresses (RFC 5737, RFC 3849), on a link that is not connected yet
NETWORK = Attachment(
    netns="",
    interfaces=(
        Interface(
            name="eth0",
            tap="tap0",
            mac="02:00:00:72:65:68",
            mtu=1500,
            addresses=("192.0.2.2/24", "2001:db8::2/64"),
        ),
    ),
    routes=(
        Route(destination="0.0.0.0/0", gateway="192.0.2.1", interface="eth0"),
        Route(destination="::/0", gateway="2001:db8::1", interface="eth0"),
    ),
)


@dataclass(frozen=True, slots=True)
class WarmupCommand:
    """What the container runs: a file of the guest, bound to PROGRAM, and two command lines."""

    source: str = "/init"
    service: Sequence[str] = (PROGRAM, "--listen", "unix:/tmp/warm")  # runs until it is killed
    exec: Sequence[str] = (PROGRAM,)  # exits at once


async def warm_network(client: GuestClient) -> None:
    """Configure a pod's first interface and undo it (a dry run). Raises as `warm_up` does."""
    spec = PodSpec(name="", namespace="", uid="", hostname=NAME)
    configure = encode_configuration(
        compile_identity(spec, entropy=b"", machine_id="", wall_ns=0),
        compile_network(spec, NETWORK, first_mac=FIRST_MAC),
    )
    configure.dry_run = True
    await client.call(pb.Request(configure=configure), TIMEOUT_S)


async def warm_up(
    client: GuestClient, root: Path, guest_root: str, command: WarmupCommand | None = None
) -> None:
    """Run a container, an exec in it, and remove it.

    Makes and removes `root`, a directory of the host that the guest sees as `guest_root`. Raises GuestError,
    GuestUnreachable, DeadlineExceeded; OSError when the directory cannot be made.
    """
    command = command or WarmupCommand()
    plan = await asyncio.to_thread(_prepare, root, guest_root, command)
    try:
        await client.call(pb.Request(start=encode_container(plan)), TIMEOUT_S)
        await run_exec(
            client, NAME, encode_process(compile_exec(plan, command.exec)), TIMEOUT_S, OUTPUT_LIMIT
        )
    finally:
        await client.call(pb.Request(remove=pb.Remove(container_id=NAME)), TIMEOUT_S)
        await asyncio.to_thread(remove_tree, root)


def _prepare(root: Path, guest_root: str, command: WarmupCommand) -> ContainerPlan:
    root.mkdir(mode=0o755)
    plan = compile_plan(guest_root, command)
    make_mount_points(root, plan)
    return plan


def compile_plan(guest_root: str, command: WarmupCommand) -> ContainerPlan:
    """Return the plan of a container with default options, run as user `nobody` under the default filters."""
    spec = ContainerSpec(
        name=NAME,
        image="",
        command=tuple(command.service),
        security=SecuritySpec(seccomp=Seccomp(kind=SeccompKind.RUNTIME_DEFAULT)),
    )
    plan = compile_container(
        spec,
        PodSpec(name="", namespace="", uid=""),
        ImageDefaults(),
        container_id=NAME,
        rootfs=guest_root,
        mount_sources=(),
        user=ResolvedUser(uid=NOBODY, gid=NOBODY, groups=(NOBODY,)),
        files=PodFiles(hosts=b"\n", hostname=b"warm\n", resolv_conf=b"\n"),
        seccomp=seccomp_for(spec.security),
        device_filter=device_filter_for(spec, ()),
        devices=(),
    )
    # /dev/shm is the pod's, and is made with it
    kept = (mount for mount in plan.mounts if mount.target != "/dev/shm")
    program = MountPlan(
        source=command.source,
        target=PROGRAM,
        flags=mount_flags.MS_BIND | mount_flags.MS_RDONLY,
        make=Make.FILE,
    )
    scratch = MountPlan(source="tmpfs", target="/tmp", type="tmpfs", data="mode=1777", make=Make.DIRECTORY)
    return replace(plan, mounts=(*kept, program, scratch))
