"""Pods without a VM: what is rejected, cgroup v1 under the names of v2, conmon and streams."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from sandbox.errors import GuestError, InvalidSpec, StreamReset
from sandbox.host.cgroup import Layout, Mode
from sandbox.host_pods import cgroups, conmon
from sandbox.host_pods.conmon import Bundle, ConmonOptions
from sandbox.host_pods.host_files import find_devices
from sandbox.host_pods.streams import FdReader, FdWriter
from sandbox.host_pods.sysctls import pod_sysctls
from sandbox.plan.device_filter import DEFAULT_RULES
from sandbox.plan.devices import RequestedDevice
from sandbox.plan.resources import compile_resources
from sandbox.plan.values import CgroupFile, DevicePlan
from sandbox.pods import isolation_of
from sandbox.spec import ContainerSpec, DeviceSpec, Handler, Isolation, PidMode, PodSpec, Resources
from sandbox.usage import CGROUP_FILES

HANDLER = Handler(name="vms", kernel="", initramfs="", memory_mib=256, vcpus=1, accelerator="auto")


def pod(**fields: object) -> PodSpec:
    return PodSpec(name="p", namespace="n", uid="u", **fields)  # type: ignore[arg-type]


def test_handler_accepts_or_rejects_namespaces_of_the_node() -> None:
    refusing = Handler(
        **{each: getattr(HANDLER, each) for each in HANDLER.__struct_fields__} | {"host_pods": "refuse"}
    )
    assert isolation_of(pod(), refusing) is Isolation.VM
    for field, spec in (
        ("network", pod(host_network=True)),
        ("pid", pod(pid_mode=PidMode.NODE)),
        ("ipc", pod(host_ipc=True)),
    ):
        assert isolation_of(spec, HANDLER) is Isolation.PROCESS
        with pytest.raises(InvalidSpec, match=r'host_pods = "process" for handlers\.vms') as caught:
            isolation_of(spec, refusing)
        assert caught.value.field == f"config.linux.security_context.namespace_options.{field}"


# ------------------------------------------------------------------------------------------ sysctls


def test_sysctls_of_the_pods_namespaces_are_accepted() -> None:
    wanted = {"net.core.somaxconn": "1024", "kernel.shmmax": "1", "fs.mqueue.msg_max": "5"}
    found = pod_sysctls(pod(sysctls=wanted))
    assert found["net/core/somaxconn"] == "1024" and found["kernel/shmmax"] == "1"
    assert found["net/ipv4/ip_unprivileged_port_start"] == "0", "as in a VM"


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("net.core.somaxconn", {"host_network": True}, "the node's network"),
        ("kernel.shmmax", {"host_ipc": True}, "the node's IPC"),
        ("vm.swappiness", {"host_ipc": True}, "is the node's"),
        ("kernel.hostname", {"host_network": True}, "is the node's"),
    ],
)
def test_sysctl_that_would_change_the_node_is_rejected(
    name: str, fields: dict[str, object], why: str
) -> None:
    with pytest.raises(InvalidSpec, match=why) as caught:
        pod_sysctls(pod(sysctls={name: "1"}, **fields))
    assert caught.value.field == f"config.linux.sysctls[{name!r}]"


def test_node_network_gets_no_default_sysctls() -> None:
    assert pod_sysctls(pod(host_network=True)) == {}


# ------------------------------------------------------------------------------------------ devices


def test_requested_device_is_found_on_the_host(tmp_path: Path) -> None:
    def wanted(path: str, permissions: str = "rwm") -> list[RequestedDevice]:
        device = DeviceSpec(container_path="/dev/mine", host_path=path, permissions=permissions)
        return list(find_devices(ContainerSpec(name="c", image="i", devices=(device,))))

    mode = Path("/dev/null").stat().st_mode & 0o7777
    assert wanted("/dev/null", "r") == [RequestedDevice(DevicePlan("/dev/mine", 1, 3, mode=mode), "r")]
    with pytest.raises(InvalidSpec, match="is not a device") as caught:
        wanted(str(tmp_path))
    assert caught.value.field == "config.devices[0].host_path"


def test_device_rules_are_written_to_cgroup_v1(tmp_path: Path) -> None:
    for name in ("devices.deny", "devices.allow"):
        (tmp_path / "c" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "c" / name).touch()
    cgroups.allow_devices(v1(tmp_path), "/c", DEFAULT_RULES[:3], b"")
    assert (tmp_path / "c/devices.deny").read_text() == "a"
    assert (tmp_path / "c/devices.allow").read_text() == "c 1:3 rwm", "the last rule; each is a write"


# ------------------------------------------------------------------------------------------- limits


def v1(root: Path) -> Layout:
    return Layout(mode=Mode.V1, hierarchies=(str(root),))


def write_all(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_values_of_cgroup_v1_are_read_under_names_of_v2(tmp_path: Path) -> None:
    files = {
        "cpuacct.usage": "5000000\n",
        "cpuacct.usage_user": "3000000\n",
        "cpuacct.usage_sys": "2000000\n",
        "cpu.stat": "nr_periods 3\nnr_throttled 2\nthrottled_time 7000\n",
        "memory.usage_in_bytes": "4096\n",
        "memory.limit_in_bytes": "8192\n",
        "memory.memsw.limit_in_bytes": "12288\n",
        "memory.max_usage_in_bytes": "5000\n",
        "memory.failcnt": "4\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        "memory.stat": "cache 1\ntotal_cache 10\ntotal_rss 20\ntotal_inactive_file 5\ntotal_swap 6\n",
        "pids.current": "3\n",
        "pids.max": "max\n",
        "blkio.throttle.io_service_bytes_recursive": "8:0 Read 100\n8:0 Write 200\n8:0 Total 300\n",
        "blkio.throttle.io_serviced_recursive": "8:0 Read 1\n8:0 Write 2\n",
    }
    write_all(tmp_path / "c", files)
    found = {name: cgroups.read(v1(tmp_path), "/c", name) for name in CGROUP_FILES}
    assert found["cpu.stat"].splitlines()[:3] == [b"usage_usec 5000", b"user_usec 3000", b"system_usec 2000"]
    assert b"throttled_usec 7\n" in found["cpu.stat"]
    assert (found["memory.current"], found["memory.max"]) == (b"4096\n", b"8192\n")
    assert (found["memory.peak"], found["memory.swap.max"]) == (b"5000\n", b"4096\n")
    assert found["memory.events"] == b"max 4\noom_kill 1\n"
    assert found["memory.stat"].startswith(b"anon 20\nfile 10\n")
    assert (found["pids.current"], found["pids.max"]) == (b"3\n", b"max\n")
    assert found["io.stat"] == b"8:0 rbytes=100 wbytes=200 rios=1 wios=2\n"
    assert cgroups.oom_kills(v1(tmp_path), "/c") == 1


def test_unlimited_memory_of_cgroup_v1_is_max(tmp_path: Path) -> None:
    most = str((1 << 63) - 4096)
    write_all(tmp_path / "c", {"memory.limit_in_bytes": most, "memory.memsw.limit_in_bytes": most})
    assert cgroups.read(v1(tmp_path), "/c", "memory.max") == b"max\n"
    assert cgroups.read(v1(tmp_path), "/c", "memory.swap.max") == b"max\n"


def test_limits_are_written_to_cgroup_v1(tmp_path: Path) -> None:
    names = ("cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "memory.limit_in_bytes", "cpuset.cpus")
    write_all(tmp_path / "c", dict.fromkeys(names, ""))
    resources = Resources(cpu_shares=512, cpu_quota=20_000, memory_limit=1 << 20, cpuset_cpus="0")
    cgroups.write_limits(v1(tmp_path), "/c", compile_resources(resources), resources)
    found = {name: (tmp_path / "c" / name).read_text() for name in names}
    assert found == dict(zip(names, ("512", "100000", "20000", str(1 << 20), "0"), strict=True))


def test_limit_that_cgroup_v1_lacks_is_rejected(tmp_path: Path) -> None:
    write_all(tmp_path / "c", {})
    unified = Resources(unified={"memory.high": "1"})
    with pytest.raises(InvalidSpec, match="cgroup v1") as caught:
        cgroups.write_limits(v1(tmp_path), "/c", compile_resources(unified), unified)
    assert caught.value.field == "config.linux.resources.unified['memory.high']"
    with pytest.raises(GuestError, match="no such controller"):
        cgroups.write_limits(v1(tmp_path), "/c", (), Resources(cpu_shares=2))


def test_limits_are_written_and_read_in_cgroup_v2(tmp_path: Path) -> None:
    v2 = Layout(mode=Mode.V2, hierarchies=(), unified=str(tmp_path))
    write_all(tmp_path / "c", {"memory.max": "", "cpu.stat": "usage_usec 1\n"})
    files = [CgroupFile(name=name, value="5") for name in ("memory.max", "memory.swap.max")]
    cgroups.write_limits(v2, "/c", files, Resources())
    assert not (tmp_path / "c/memory.swap.max").exists(), "a kernel without swap has nothing to limit"
    assert (tmp_path / "c/memory.max").read_text() == "5"
    assert cgroups.read(v2, "/c", "cpu.stat") == b"usage_usec 1\n"
    assert cgroups.read(v2, "/c", "io.stat") == b""


def test_processes_started_by_a_leader_are_found_across_sessions() -> None:
    script = "sleep 1000 & setsid sleep 1001 & echo ready; wait"
    leader = subprocess.Popen(["sh", "-c", script], start_new_session=True, stdout=subprocess.PIPE)
    try:
        assert leader.stdout is not None and leader.stdout.readline() == b"ready\n"
        everyone = [int(each.name) for each in Path("/proc").glob("[0-9]*")]
        found = cgroups.started_by(leader.pid)(everyone)
        assert leader.pid in found and len(found) == 3 and os.getpid() not in found
    finally:
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        leader.wait()


# ------------------------------------------------------------------------------------------- conmon


def bundle(path: Path) -> Bundle:
    return Bundle(id="c1", path=path, state=path / "crun")


def options(layout: Layout, **fields: object) -> ConmonOptions:
    usual: dict[str, object] = {"log_path": "", "tty": False, "stdin": False, "stdin_once": False}
    return ConmonOptions(cgroups=(), layout=layout, **(usual | fields))  # type: ignore[arg-type]


def test_stdin_is_left_open_unless_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conmon, "find_program", lambda name: f"/bin/{name}")
    both = conmon.command(bundle(tmp_path), options(v1(tmp_path), stdin=True, tty=True))
    assert {"--stdin", "--leave-stdin-open", "--terminal"} <= set(both)
    once = conmon.command(bundle(tmp_path), options(v1(tmp_path), stdin=True, stdin_once=True))
    assert "--leave-stdin-open" not in once
    assert "k8s-file:/dev/null" in once


def test_controllers_of_v2_beside_v1_are_hidden_from_crun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conmon, "find_program", lambda name: f"/bin/{name}")
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")
    hybrid = Layout(mode=Mode.HYBRID, hierarchies=("/v1",), unified=str(tmp_path))
    assert conmon.command(bundle(tmp_path), options(hybrid))[:2] == ["unshare", "--mount"]
    (tmp_path / "cgroup.controllers").write_text("\n")
    assert conmon.command(bundle(tmp_path), options(hybrid))[0] == "conmon"


def test_exit_code_is_read_once_it_is_complete(tmp_path: Path) -> None:
    one = bundle(tmp_path)
    assert one.exit_code() is None
    one.exit_file.parent.mkdir()
    one.exit_file.write_text("")
    assert one.exit_code() is None
    one.exit_file.write_text("137")
    code = one.exit_code()
    assert code is not None and code[0] == 137


# ------------------------------------------------------------------------------------------ streams


def pipe() -> tuple[int, int]:
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return reading, writing


async def test_pipe_is_read_to_its_end() -> None:
    reading, writing = pipe()
    reader, writer = FdReader(reading), FdWriter(writing)
    waiting = asyncio.create_task(reader.read())
    await writer.write(b"one")
    assert await waiting == b"one"
    writer.close()
    writer.close()
    assert await reader.read() == b""
    assert await reader.read() == b""


async def test_full_pipe_blocks_its_writer_until_it_is_read() -> None:
    reading, writing = pipe()
    reader, writer = FdReader(reading), FdWriter(writing)
    size = 1 << 20
    writes = asyncio.create_task(writer.write(bytes(size)))
    await asyncio.sleep(0)
    assert not writes.done()
    taken = 0
    while taken < size:
        taken += len(await reader.read())
    await writes
    reader.stop()
    with pytest.raises(StreamReset):
        await reader.read()
    with pytest.raises(StreamReset, match="its reader has closed it"):
        await writer.write(b"x")
    writer.close()


async def test_pipe_held_open_by_a_background_child_ends_on_expire() -> None:
    reading, writing = pipe()
    reader = FdReader(reading)
    os.write(writing, b"last")
    waiting = asyncio.create_task(_all(reader))
    await asyncio.sleep(0)
    reader.expire()
    assert await waiting == b"last"
    os.close(writing)


async def _all(reader: FdReader) -> bytes:
    found = b""
    while chunk := await reader.read():
        found += chunk
    return found


async def test_stop_wakes_a_pending_read() -> None:
    reading, writing = pipe()
    reader = FdReader(reading)
    waiting = asyncio.create_task(reader.read())
    await asyncio.sleep(0)
    reader.stop()
    with pytest.raises(StreamReset):
        await waiting
    os.close(writing)
