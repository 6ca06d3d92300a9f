"""Rules of a plan, one at a time; whole plans are pinned by test_plan_golden."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import InvalidSpec
from sandbox.host.ids import IdRange
from sandbox.host.mount_flags import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY
from sandbox.plan import (
    MountSource,
    compile_container,
    compile_exec,
    compile_identity,
    compile_network,
    vm_size,
)
from sandbox.plan.configure import sysctl_path
from sandbox.plan.devices import guest_devices
from sandbox.plan.mounts import ENGINE_DIRECTORIES, compile_mounts, plain_directories
from sandbox.plan.paths import container_path, covers, depth
from sandbox.plan.pod_files import PodFiles
from sandbox.plan.size import BOOT_FLOOR_MIB
from sandbox.plan.users import ResolvedUser
from sandbox.plan.values import ContainerPlan, IdentityPlan, Make, MountPlan, NetworkPlan
from sandbox.seccomp import Filter
from sandbox.spec import (
    ContainerSpec,
    DeviceSpec,
    Handler,
    ImageDefaults,
    MountSpec,
    PidMode,
    PodSpec,
    Propagation,
    Resources,
    SecuritySpec,
    UserNamespace,
    VmSize,
)

POD = PodSpec(name="web", namespace="default", uid="u1")
FILES = PodFiles(hosts=b"", hostname=b"fallback\n", resolv_conf=b"")


def start(
    image: ImageDefaults | None = None, *, pod: PodSpec = POD, is_directory: bool = True, **spec: object
) -> ContainerPlan:
    spec = {"command": ("/bin/true",), **spec} if image is None else spec
    container = ContainerSpec(name="c", image="i", **spec)  # type: ignore[arg-type]
    return compile_container(
        container,
        pod,
        image or ImageDefaults(),
        container_id="c1",
        rootfs="/run/husk/rootfs/c1",
        mount_sources=[MountSource(path="/v", is_directory=is_directory)] * len(container.mounts),
        user=ResolvedUser(),
        files=FILES,
        seccomp=Filter(),
        device_filter=b"",
        devices=guest_devices(container, {}),
    )


def environment(plan: ContainerPlan) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for entry in plan.process.env:
        name, _, value = entry.partition(b"=")
        assert name not in found
        found[name] = value
    return found


# Kubernetes, "Define a Command and Arguments for a Container": the table
def test_user_namespace_maps_ids_of_process_and_mounts() -> None:
    ids = (IdRange(inside=0, outside=70000, length=65536),)
    space = UserNamespace(uids=ids, gids=ids)
    pod = msgspec.structs.replace(POD, user_namespace=space)
    plan = start(pod=pod, security=SecuritySpec(user_namespace=space))
    for ranges in (plan.process.uid_ranges, plan.process.gid_ranges):
        assert [(each.inside, each.outside, each.length) for each in ranges] == [(0, 70000, 65536)]
    data = {mount.target: mount.data for mount in plan.mounts}
    assert "uid=70000,gid=70000" in data["/dev"]
    assert "gid=70005" in data["/dev/pts"]
    with pytest.raises(InvalidSpec, match="differs from the sandbox's"):
        start(pod=pod)


def bind(spec: MountSpec, source: MountSource) -> MountPlan:
    mounts = compile_mounts(ContainerSpec(name="c", image="i", mounts=(spec,)), ImageDefaults(), [source])
    return next(mount for mount in mounts if mount.target == spec.container_path)


def plain(
    security: SecuritySpec, *volumes: str, mounts: tuple[str, ...] = (), readonly: bool = False
) -> list[str]:
    spec = ContainerSpec(
        name="c",
        image="i",
        security=msgspec.structs.replace(security, readonly_rootfs=readonly),
        mounts=tuple(MountSpec(container_path=path, host_path="/h") for path in mounts),
    )
    return list(plain_directories(spec, ImageDefaults(volumes=volumes)))


def test_container_that_may_mount_has_plain_directories_for_overlays() -> None:
    engines = list(ENGINE_DIRECTORIES)
    for security in (SecuritySpec(privileged=True), SecuritySpec(add_capabilities=("SYS_ADMIN",))):
        assert plain(security, "/data") == ["/data", *engines]
        assert plain(security, "/data", readonly=True) == ["/data"]
        assert plain(security, "/var/lib", "/var/lib/docker/x", "/") == ["/var/lib"]
        assert plain(security, "/a/b", mounts=("/a", "/var/lib/docker")) == engines[1:]
    assert plain(SecuritySpec(), "/data") == []
    assert plain(SecuritySpec(privileged=False, drop_capabilities=("ALL",)), "/data") == []


def test_mount_options_and_submounts_are_planned() -> None:
    spec = MountSpec(container_path="/a", host_path="/h", readonly=True, options=("noexec", "nodev"))
    mount = bind(spec, MountSource(path="/v/0", is_directory=True, submounts=("b/c",)))
    assert mount.flags & (MS_NOEXEC | MS_NODEV | MS_NOSUID) == MS_NOEXEC | MS_NODEV
    assert (list(mount.submounts), mount.recursive_readonly) == (["b/c"], False)


def test_image_volume_is_read_only_recursively() -> None:
    spec = MountSpec(container_path="/a", host_path="", readonly=True, image="i")
    mount = bind(spec, MountSource(path="/v/0", is_directory=True))
    assert (mount.flags & (MS_RDONLY | MS_NOEXEC), mount.recursive_readonly) == (MS_RDONLY, True)


@pytest.mark.parametrize(
    ("command", "args", "argv"),
    [
        ((), (), ["/ep-1", "foo", "bar"]),
        (("/ep-2",), (), ["/ep-2"]),
        ((), ("zoo",), ["/ep-1", "zoo"]),
        (("/ep-2",), ("zoo",), ["/ep-2", "zoo"]),
    ],
)
def test_command_and_args_replace_those_of_the_image(
    command: tuple[str, ...], args: tuple[str, ...], argv: list[str]
) -> None:
    image = ImageDefaults(entrypoint=("/ep-1",), cmd=("foo", "bar"))
    assert list(start(image, command=command, args=args).process.argv) == argv


@pytest.mark.parametrize("image", [ImageDefaults(), ImageDefaults(cmd=("",))])
def test_container_without_program_is_rejected(image: ImageDefaults) -> None:
    with pytest.raises(InvalidSpec) as caught:
        start(image)
    assert caught.value.field == "config.command"


def test_environment_without_any_of_the_image_has_defaults() -> None:
    found = environment(start())
    assert found[b"PATH"].startswith(b"/usr/local/sbin:")
    assert found[b"HOSTNAME"] == b"fallback"
    assert found[b"HOME"] == b"/"
    assert b"TERM" not in found


def test_environment_of_client_overrides_image_and_defaults() -> None:
    image = ImageDefaults(cmd=("x",), env=("PATH=/image", "A=image", "junk", "=x", "B=b=c", "N=\0"))
    found = environment(start(image, envs=(("A", b"first"), ("A", b"client"), ("HOSTNAME", b"h"))))
    assert found[b"PATH"] == b"/image"
    assert found[b"A"] == b"client"
    assert found[b"B"] == b"b=c"
    assert found[b"HOSTNAME"] == b"h"
    assert not {b"", b"junk", b"N"} & set(found)


@pytest.mark.parametrize(
    ("image", "wanted", "cwd"),
    [("", "", "/"), ("app", "", "/app"), ("/app/", "", "/app"), ("/app", "/srv/../x", "/x")],
)
def test_working_directory_of_client_overrides_the_image(image: str, wanted: str, cwd: str) -> None:
    assert start(ImageDefaults(cmd=("x",), working_dir=image), working_dir=wanted).process.cwd == cwd


def test_container_with_terminal_has_term_unless_set() -> None:
    assert environment(start(tty=True))[b"TERM"] == b"xterm"
    assert environment(start(tty=True, envs=(("TERM", b"vt100"),)))[b"TERM"] == b"vt100"


def targets(plan: ContainerPlan) -> list[str]:
    return [mount.target for mount in plan.mounts]


def mount(path: str, **more: object) -> MountSpec:
    return MountSpec(container_path=path, host_path="/h", **more)  # type: ignore[arg-type]


def test_mount_of_client_replaces_the_standard_one() -> None:
    plan = start(mounts=(mount("/dev/shm/"), mount("/sys")))
    assert targets(plan).count("/dev/shm") == targets(plan).count("/sys") == 1
    assert "/sys/fs/cgroup" not in targets(plan)
    assert all(each.source == "/v" for each in plan.mounts if each.target in ("/dev/shm", "/sys"))


def test_mount_over_hosts_replaces_the_pods_file() -> None:
    plan = start(mounts=(mount("/etc//hosts"),), is_directory=False)
    assert [file.path for file in plan.files] == ["/etc/hostname", "/etc/resolv.conf"]
    assert next(each for each in plan.mounts if each.target == "/etc/hosts").make == Make.FILE


def test_privileged_container_writes_sysfs_and_has_devices_of_guest() -> None:
    def flags(plan: ContainerPlan, target: str) -> int:
        return next(each.flags for each in plan.mounts if each.target == target)

    privileged = start(security=SecuritySpec(privileged=True, masked_paths=("/proc/kcore",)))
    for target in ("/sys", "/sys/fs/cgroup"):
        assert not flags(privileged, target) & 1
        assert flags(start(), target) & 1
    assert not privileged.devices
    assert not privileged.masked_paths
    assert "devtmpfs" in [each.type for each in privileged.mounts]


@given(st.permutations(["/a", "/a/b", "/a/b/c", "/dev/shm/x", "/proc/sys/y", "/z"]))
def test_mounts_in_any_order_never_cover_an_earlier_one(paths: list[str]) -> None:
    found = targets(start(mounts=tuple(mount(path) for path in paths)))
    for position, target in enumerate(found):
        assert not any(covers(target, earlier) for earlier in found[:position])


def test_image_volumes_on_read_only_root_are_writable() -> None:
    image = ImageDefaults(cmd=("x",), volumes=("/data", "/cache/", "/data"))
    assert not {"/data", "/cache"} & set(targets(start(image)))
    plan = start(image, security=SecuritySpec(readonly_rootfs=True), mounts=(mount("/cache"),))
    assert targets(plan).count("/data") == 1
    assert [each.type for each in plan.mounts if each.target == "/cache"] == [""]


def test_root_is_a_slave_only_when_a_mount_receives() -> None:
    assert start(mounts=(mount("/a"),)).rootfs_propagation == 0
    receiving = start(mounts=(mount("/a"), mount("/b", propagation=Propagation.HOST_TO_CONTAINER)))
    assert receiving.rootfs_propagation == 1 << 19 | 0x4000


@pytest.mark.parametrize(
    ("mode", "target"), [(PidMode.CONTAINER, ""), (PidMode.POD, ""), (PidMode.TARGET, "c0")]
)
def test_pid_namespace_of_each_mode_is_planned(mode: PidMode, target: str) -> None:
    plan = start(security=SecuritySpec(pid_mode=mode, pid_target=target))
    assert (plan.pid_namespace, plan.pid_target) == (mode, target)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"mounts": (mount("/"),)}, "config.mounts[0].container_path"),
        ({"mounts": (mount("/a"), mount("b"))}, "config.mounts[1].container_path"),
        ({"mounts": (mount("/a\0"),)}, "config.mounts[0].container_path"),
        ({"mounts": (mount("/" + "a" * 5000),)}, "config.mounts[0].container_path"),
        ({"mounts": (mount("/a", recursive_readonly=True),)}, "config.mounts[0].recursive_read_only"),
        (
            {
                "mounts": (
                    mount(
                        "/a",
                        recursive_readonly=True,
                        readonly=True,
                        propagation=Propagation.HOST_TO_CONTAINER,
                    ),
                )
            },
            "config.mounts[0].recursive_read_only",
        ),
        (
            {
                "mounts": (
                    mount(
                        "/a", recursive_readonly=True, readonly=True, propagation=Propagation.BIDIRECTIONAL
                    ),
                )
            },
            "config.mounts[0].recursive_read_only",
        ),
        (
            {"devices": (DeviceSpec(container_path="/dev/kvm", host_path="/dev/kvm"),)},
            "config.devices[0].host_path",
        ),
        ({"envs": (("A=B", b""),)}, "config.envs[0].key"),
        ({"envs": (("", b""),)}, "config.envs[0].key"),
        ({"envs": (("A", b"\0"),)}, "config.envs[0].value"),
        ({"command": ("a", "\ud800")}, "config.command or config.args"),
        ({"command": ("a\0",)}, "config.command or config.args"),
        ({"working_dir": "relative"}, "config.working_dir"),
        ({"resources": Resources(oom_score_adj=-1001)}, "config.linux.resources.oom_score_adj"),
        (
            {"security": SecuritySpec(masked_paths=("/ok", "no"))},
            "config.linux.security_context.masked_paths[1]",
        ),
        ({"security": SecuritySpec(readonly_paths=("//",))}, "config.linux.security_context.readonly_paths"),
        (
            {"security": SecuritySpec(pid_mode=PidMode.TARGET)},
            "config.linux.security_context.namespace_options.target_id",
        ),
    ],
)
def test_invalid_container_is_rejected_with_its_field(spec: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        start(**spec)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_exec_is_the_first_process_with_other_arguments() -> None:
    plan = start(working_dir="/srv", security=SecuritySpec(no_new_privs=True, add_capabilities=("BPF",)))
    process = compile_exec(plan, ["ls", "-l"])
    assert process == msgspec.structs.replace(plan.process, argv=("ls", "-l"), make_cwd=False)
    assert list(plan.process.argv) == ["/bin/true"]  # untouched


def test_exec_without_program_is_rejected() -> None:
    with pytest.raises(InvalidSpec):
        compile_exec(start(), [])


# ------------------------------------------------------------------------------------- paths


@given(st.text())
def test_container_path_of_any_text_is_normalized_or_rejected(text: str) -> None:
    try:
        path = container_path(text, "f")
    except InvalidSpec:
        return
    assert path.startswith("/")
    assert not {"", ".", ".."} & set(path[1:].split("/")) or path == "/"
    assert container_path(path, "f") == path
    assert covers("/", path)
    assert depth(path) >= (path != "/")


# ---------------------------------------------------------------------------------- configure


def pod(**fields: object) -> PodSpec:
    return PodSpec(name="web", namespace="default", uid="u1", **fields)  # type: ignore[arg-type]


def identity(**fields: object) -> IdentityPlan:
    return compile_identity(pod(**fields), entropy=b"", machine_id="0123456789abcdef" * 2, wall_ns=0)


def network(**fields: object) -> NetworkPlan:
    return compile_network(pod(**fields), None, first_mac="")


def test_pod_without_network_and_hostname_has_no_interfaces_and_is_named_by_its_id() -> None:
    assert not network().interfaces
    assert identity().hostname == "0123456789ab"


def test_sysctl_in_either_spelling_replaces_the_default() -> None:
    for name in ("net.ipv4.ip_unprivileged_port_start", "net/ipv4/ip_unprivileged_port_start"):
        sysctls = network(sysctls={name: "80"}).sysctls
        found = [each.value for each in sysctls if each.path.endswith("port_start")]
        assert found == ["80"]


@pytest.mark.parametrize(
    "name", ["kernel.msgmax", "net/ipv4/conf/eth0.100/forwarding", "net.ipv4.conf.eth0/1.forwarding"]
)
def test_sysctl_of_any_kind_is_accepted_as_its_path(name: str) -> None:
    assert sysctl_path(name) in [each.path for each in network(sysctls={name: "1"}).sysctls]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "kernel",
        "/kernel/x",
        "../etc/x",
        "net/../../etc/passwd",
        "a.//.b",
        "kernel..x",
        "k.x\0",
        "a b.c",
        "a/",
    ],
)
def test_invalid_sysctl_name_is_rejected(name: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        network(sysctls={name: "1"})
    assert caught.value.field == f"config.linux.sysctls[{name!r}]"


@pytest.mark.parametrize("value", ["1\n2", "1\0", "9" * 5000])
def test_invalid_sysctl_value_is_rejected(value: str) -> None:
    with pytest.raises(InvalidSpec):
        network(sysctls={"kernel.msgmax": value})


@pytest.mark.parametrize("hostname", ["a" * 65, "a b", "a\n", "a/b", "a\0"])
def test_invalid_hostname_is_rejected(hostname: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        identity(hostname=hostname)
    assert caught.value.field == "config.hostname"


# --------------------------------------------------------------------------------------- size

HANDLER = Handler(name="", kernel="", initramfs="", memory_mib=512, vcpus=1, accelerator="auto")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("resources", "overhead", "size"),
    [
        (Resources(), Resources(), VmSize(memory_mib=512, vcpus=1)),
        (Resources(), Resources(memory_limit=64 * MIB, cpu_quota=50_000), VmSize(memory_mib=512, vcpus=1)),
        (Resources(cpu_quota=180_000), Resources(), VmSize(memory_mib=512, vcpus=2)),
        (
            Resources(cpu_quota=180_000, cpu_period=100_000),
            Resources(cpu_quota=25_000),
            VmSize(memory_mib=512, vcpus=3),
        ),
        (Resources(cpu_quota=90_000, cpu_period=50_000), Resources(), VmSize(memory_mib=512, vcpus=2)),
        (Resources(cpu_quota=200_000), Resources(), VmSize(memory_mib=512, vcpus=2)),
        (Resources(cpu_quota=1_000), Resources(), VmSize(memory_mib=512, vcpus=1)),
        (Resources(cpu_quota=-1, memory_limit=-1), Resources(), VmSize(memory_mib=512, vcpus=1)),
        (Resources(cpu_quota=10**12), Resources(), VmSize(memory_mib=512, vcpus=255)),
        (
            Resources(memory_limit=1024 * MIB),
            Resources(memory_limit=160 * MIB),
            VmSize(memory_mib=1184, vcpus=1),
        ),
        (Resources(memory_limit=1), Resources(), VmSize(memory_mib=BOOT_FLOOR_MIB + 1, vcpus=1)),
    ],
)
def test_vm_size_follows_limits_and_overhead(resources: Resources, overhead: Resources, size: VmSize) -> None:
    pod = PodSpec(name="p", namespace="n", uid="u", resources=resources, overhead=overhead)
    assert vm_size(pod, HANDLER) == size


@given(st.integers(-1, 1 << 40), st.integers(-1, 1 << 40))
def test_vm_size_is_never_below_the_boot_floor(limit: int, overhead: int) -> None:
    pod = PodSpec(
        name="p",
        namespace="n",
        uid="u",
        resources=Resources(memory_limit=limit),
        overhead=Resources(memory_limit=overhead),
    )
    small = Handler(name="", kernel="", initramfs="", memory_mib=8, vcpus=0, accelerator="tcg")
    size = vm_size(pod, small)
    assert size.memory_mib >= BOOT_FLOOR_MIB
    assert size.memory_mib * MIB >= limit
    assert size.vcpus >= 1
