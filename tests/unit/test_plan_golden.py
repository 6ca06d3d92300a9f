"""Whole plans, pinned: tests/golden/plan/NAME.txt is what the agent is sent for a specification.

A change of a plan shows as a diff to read. HUSK_UPDATE_GOLDEN=1 rewrites the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf.message import Message

from network.attach import Attachment, Interface, Route
from sandbox import capabilities
from sandbox.apparmor.profile import UNCONFINED, Policy
from sandbox.plan import MountSource, compile_container, compile_exec, compile_identity, compile_network
from sandbox.plan.devices import guest_devices
from sandbox.plan.encode import encode_configuration, encode_container, encode_process
from sandbox.plan.pod_files import PodFiles
from sandbox.plan.users import ResolvedUser
from sandbox.plan.values import ContainerPlan, IdentityPlan, NetworkPlan, ProcessPlan
from sandbox.seccomp import Filter
from sandbox.spec import (
    ContainerSpec,
    DeviceSpec,
    ImageDefaults,
    MountSpec,
    PidMode,
    PodSpec,
    Propagation,
    Resources,
    SecuritySpec,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "plan"

POD = PodSpec(name="web", namespace="default", uid="u1", hostname="web-0")
IMAGE = ImageDefaults(
    entrypoint=("/entry",),
    cmd=("serve",),
    env=("PATH=/app/bin:/bin", "MODE=image"),
    working_dir="/app",
    user="app",
    volumes=("/data", "/cache"),
)
FILES = PodFiles(hosts=b"127.0.0.1 localhost\n", hostname=b"web-0\n", resolv_conf=b"nameserver 192.0.2.53\n")
APP = ResolvedUser(uid=1000, gid=1000, groups=(1000, 50000), home="/home/app")


def start(
    spec: ContainerSpec,
    *,
    image: ImageDefaults = IMAGE,
    user: ResolvedUser = APP,
    directories: bool = True,
    seccomp: Filter | None = None,
    apparmor: Policy = UNCONFINED,
    device_filter: bytes = b"<device filter>",
) -> ContainerPlan:
    return compile_container(
        spec,
        POD,
        image,
        container_id="c1",
        rootfs="/run/husk/rootfs/c1",
        mount_sources=[
            MountSource(
                path=f"/run/husk/volumes/c1/{number}", is_directory=not mount.container_path.endswith("s")
            )
            for number, mount in enumerate(spec.mounts)
        ],
        user=user,
        files=FILES,
        seccomp=seccomp or Filter(),
        device_filter=device_filter,
        apparmor=apparmor,
        devices=guest_devices(spec, {}),
    )


def usual() -> ContainerPlan:
    return start(ContainerSpec(name="web", image="app"))


def bare_image() -> ContainerPlan:
    spec = ContainerSpec(name="web", image="scratch", command=("/bin/sh", "-c"), args=("exit 3",))
    return start(spec, image=ImageDefaults(), user=ResolvedUser())


def terminal() -> ContainerPlan:
    spec = ContainerSpec(
        name="shell",
        image="app",
        command=("/bin/sh",),
        working_dir="/srv//x/",
        envs=(("MODE", b"client"), ("RAW", b"\xff\n"), ("HOME", b"/root")),
        tty=True,
        stdin=True,
    )
    return start(spec)


def privileged() -> ContainerPlan:
    security = SecuritySpec(
        privileged=True, masked_paths=("/proc/kcore",), readonly_paths=("/proc/sys",), pid_mode=PidMode.POD
    )
    return start(ContainerSpec(name="root", image="app", security=security), device_filter=b"")


def confined() -> ContainerPlan:
    security = SecuritySpec(
        add_capabilities=("cap_net_admin",),
        drop_capabilities=("ALL",),
        ambient_capabilities=("NET_BIND_SERVICE",),
        readonly_rootfs=True,
        no_new_privs=True,
        masked_paths=("/proc/kcore", "/proc//keys", "/proc/kcore"),
        readonly_paths=("/proc/sys",),
        pid_mode=PidMode.TARGET,
        pid_target="c0",
    )
    spec = ContainerSpec(
        name="web",
        image="app",
        security=security,
        mounts=(MountSpec(container_path="/cache", host_path="/h"),),
        devices=(DeviceSpec(container_path="/dev/other/fuse", host_path="/dev/fuse", permissions="rw"),),
    )
    policy = Policy(profile="web-profile", binary=b"<policy>")
    return start(spec, seccomp=Filter(bpf=b"<seccomp>", flags=4), apparmor=policy)


def mounts() -> ContainerPlan:
    def mount(target: str, propagation: Propagation = Propagation.PRIVATE, *, ro: bool = False) -> MountSpec:
        return MountSpec(container_path=target, host_path="/h", propagation=propagation, readonly=ro)

    recursive = MountSpec(container_path="/deep", host_path="/h", readonly=True, recursive_readonly=True)
    spec = ContainerSpec(
        name="web",
        image="app",
        mounts=(
            mount("/data/a/b", ro=True),
            mount("/etc/hosts"),
            mount("/data", Propagation.HOST_TO_CONTAINER),
            mount("/dev/shm"),
            mount("/data/a/", Propagation.BIDIRECTIONAL),
            recursive,
        ),
    )
    return start(spec)


def own_dev() -> ContainerPlan:
    """A client that brings its own /dev gets nothing of ours in it."""
    spec = ContainerSpec(
        name="web", image="app", mounts=(MountSpec(container_path="/dev", host_path="/dev"),)
    )
    return start(spec)


def limits() -> ContainerPlan:
    resources = Resources(
        cpu_period=50_000,
        cpu_quota=25_000,
        cpu_shares=512,
        memory_limit=64 << 20,
        memory_swap_limit=96 << 20,
        oom_score_adj=-998,
        cpuset_cpus="0-1",
        cpuset_mems="0",
        hugepage_limits={"2MB": 4 << 20, "1GB": 0},
        unified={"pids.max": "100", "memory.high": "60000000", "io.max": "8:0 rbps=1\n8:16 rbps=2"},
    )
    return start(ContainerSpec(name="web", image="app", resources=resources))


def exec_tty() -> ProcessPlan:
    plan = start(ContainerSpec(name="web", image="app"), seccomp=Filter(bpf=b"<seccomp>", flags=4))
    return compile_exec(plan, ("sh", "-i"), tty=True, rows=50, columns=132)


def configure() -> tuple[IdentityPlan | NetworkPlan, ...]:
    pod = PodSpec(
        name="web",
        namespace="default",
        uid="u1",
        hostname="web-0",
        sysctls={"kernel.shm_rmid_forced": "1", "net/ipv4/ping_group_range": "1 0"},
    )
    network = Attachment(
        netns="/run/husk/netns/p1",
        interfaces=(
            Interface(
                name="eth0",
                tap="tap0",
                mac="02:00:00:00:00:01",
                mtu=1450,
                addresses=("192.0.2.7/24", "2001:db8::7/64"),
            ),
        ),
        routes=(
            Route(destination="0.0.0.0/0", gateway="192.0.2.1", interface="eth0"),
            Route(destination="::/0", gateway="fe80::1", interface="eth0", metric=5, mtu=1400, on_link=True),
        ),
    )
    identity = compile_identity(
        pod,
        entropy=b"<entropy>",
        machine_id="0123456789abcdef0123456789abcdef",
        wall_ns=1_700_000_000_000_000_000,
    )
    return identity, compile_network(pod, network, first_mac="02:00:00:00:00:00")


Plan = ContainerPlan | ProcessPlan | tuple[IdentityPlan | NetworkPlan, ...]


def encoded(plan: Plan) -> Message:
    match plan:
        case ContainerPlan():
            return encode_container(plan)
        case ProcessPlan():
            return encode_process(plan)
    return encode_configuration(*plan)


CASES: tuple[Callable[[], Plan], ...] = (
    usual,
    bare_image,
    terminal,
    privileged,
    confined,
    mounts,
    own_dev,
    limits,
    exec_tty,
    configure,
)


@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_plan_equals_its_golden_file(case: Callable[[], Plan]) -> None:
    file = GOLDEN / f"{case.__name__}.txt"
    text = "\n".join(lines(encoded(case()))) + "\n"
    if os.environ.get("HUSK_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"read the difference, then run with HUSK_UPDATE_GOLDEN=1: {file}"


def test_every_golden_file_has_a_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == {case.__name__ for case in CASES}


def test_same_arguments_compile_to_the_same_plan() -> None:
    for case in CASES:
        assert case() == case()


# ----------------------------------------------------------------- a plan as text, in words

_MOUNT_FLAGS = {
    "ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "bind": 0x1000, "rec": 0x4000, "private": 1 << 18,
    "slave": 1 << 19, "shared": 1 << 20, "strictatime": 1 << 24,
}  # fmt: skip


def lines(message: Message, indent: str = "") -> Iterator[str]:
    for field, value in message.ListFields():
        for one in value if field.is_repeated else (value,):
            if isinstance(one, Message):
                yield f"{indent}{field.name}:"
                yield from lines(one, indent + "  ")
            else:
                yield f"{indent}{field.name}: {words(field.name, field.enum_type, one)}"


def words(name: str, enum: object, value: object) -> str:
    if enum is not None and hasattr(enum, "values_by_number"):
        return str(enum.values_by_number[value].name)
    if isinstance(value, int) and name in ("flags", "propagation", "rootfs_propagation"):
        known = [word for word, bit in _MOUNT_FLAGS.items() if value & bit]
        assert sum(_MOUNT_FLAGS[word] for word in known) == value
        return "|".join(known)
    if isinstance(value, int) and name.startswith("cap_"):
        held = [word for number, word in enumerate(capabilities.NAMES) if value >> number & 1]
        return "ALL" if value == capabilities.ALL else " ".join(held)
    if isinstance(value, int) and name == "mode":
        return f"{value:04o}"
    return repr(value) if isinstance(value, bytes | str) else str(value)
