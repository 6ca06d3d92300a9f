"""Pods that share namespaces with the node: real conmon and crun, in the daemon's namespaces."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod, parse_log
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.leaks import processes_naming
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
NODE, POD, CONTAINER, TARGET = api.NODE, api.POD, api.CONTAINER, api.TARGET


def host_pod(cri: Cri, name: str, *, linux: dict[str, Any] | None = None, **namespaces: Any) -> Pod:
    options = api.NamespaceOption(**namespaces)
    context = api.LinuxSandboxSecurityContext(namespace_options=options)
    parent = {"cgroup_parent": cri.cgroup_parent}
    return cri.run_pod(
        name,
        linux=api.LinuxPodSandboxConfig(security_context=context, **(parent | (linux or {}))),
        hostname="",
    )


def security(**fields: Any) -> api.LinuxContainerConfig:
    return api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(**fields))


def test_container_runs_to_its_end(cri: Cri) -> None:
    pod = host_pod(cri, "ends", network=NODE)
    code, text = cri.run_to_end(pod, BUSYBOX, ["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (code, sorted(text.split())) == (7, ["err", "out"])
    assert cri.pod_ip(pod) == ""


def test_requested_namespaces_are_the_nodes(cri: Cri, daemon: Daemon) -> None:
    pod = host_pod(cri, "spaces", network=NODE, pid=NODE, ipc=NODE)
    container = cri.run(pod, BUSYBOX, ["sleep", "1000"], linux=security(namespace_options=pod_options(pod)))
    pid = pid_of(cri, pod, container)
    assert {kind: shares(pid, daemon.pid, kind) for kind in ("net", "pid", "ipc", "uts", "mnt")} == {
        "net": True,
        "pid": True,
        "ipc": True,
        "uts": False,
        "mnt": False,
    }
    status = cri.pod_status(pod).status.linux.namespaces.options
    assert (status.network, status.pid, status.ipc) == (NODE, NODE, NODE)
    assert cri.exec(container, "hostname").stdout.strip() == os.uname().nodename


def test_other_namespaces_are_the_pods(cri: Cri, daemon: Daemon) -> None:
    pod = host_pod(cri, "ipc-only", ipc=NODE)
    assert re.match(r"\d+\.\d+\.\d+\.\d+", cri.pod_ip(pod))
    container = cri.run(pod, BUSYBOX, ["sleep", "1000"])
    pid = pid_of(cri, pod, container)
    assert shares(pid, daemon.pid, "ipc") and not shares(pid, daemon.pid, "net")
    assert cri.pod_ip(pod) in cri.exec(container, "ip", "addr", "show", "eth0").stdout
    other = cri.run(pod, BUSYBOX, ["sleep", "2000"])
    assert "sleep 2000" in cri.exec(container, "ps").stdout, "one PID namespace of the pod"
    assert shares(pid, pid_of(cri, pod, other), "net")


def test_handler_that_refuses_host_pods_rejects_the_pod(site: Site) -> None:
    settings: dict[str, dict[str, object]] = {
        "handlers.std": {"source": "boot", "host_pods": "refuse"},
        "metrics": {"port": 0},
    }
    made = Daemon(site.namespace, site.cni, site.mirrors, leases=site.leases, settings=settings)
    made.start()
    try:
        with pytest.raises(grpc.RpcError, match=r"namespace_options\.network: NODE") as caught:
            host_pod(made.cri, "refused", network=NODE)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        made.close()


@pytest.mark.parametrize(
    ("spaces", "sysctl", "field"),
    [
        ({"network": NODE}, "net.core.somaxconn", "config.linux.sysctls['net.core.somaxconn']"),
        ({"ipc": NODE}, "vm.swappiness", "config.linux.sysctls['vm.swappiness']"),
    ],
)
def test_sysctl_of_the_node_is_rejected(cri: Cri, spaces: dict[str, Any], sysctl: str, field: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        host_pod(cri, "sysctls", linux={"sysctls": {sysctl: "1"}}, **spaces)
    assert str(caught.value.details()).startswith(field)


def test_sysctls_of_the_pod_are_set(cri: Cri) -> None:
    pod = host_pod(cri, "sysctls", ipc=NODE, linux={"sysctls": {"net.core.somaxconn": "321"}})
    container = cri.run(pod, BUSYBOX, ["sleep", "1000"])
    assert cri.exec(container, "cat", "/proc/sys/net/core/somaxconn").stdout == "321\n"


def test_shared_memory_is_the_pods_unless_ipc_is_the_nodes(cri: Cri) -> None:
    pod = host_pod(cri, "shm", network=NODE)
    one, two = (cri.run(pod, BUSYBOX, ["sleep", "1000"]) for _ in range(2))
    cri.exec(one, "sh", "-c", "echo seen > /dev/shm/file")
    assert cri.exec(two, "cat", "/dev/shm/file").stdout == "seen\n"
    assert "65536" in cri.exec(two, "df", "-k", "/dev/shm").stdout
    assert not Path("/dev/shm/file").exists()


def test_log_rotation_loses_no_line(cri: Cri) -> None:
    pod = host_pod(cri, "logs", network=NODE)
    lines = 60_000
    script = f"n=0; while [ $n -lt {lines} ]; do n=$((n+1)); echo $n; done"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script])
    log = Path(cri.status(container).log_path)
    rotated = []
    for number in range(2):
        eventually_sync(lambda: log.stat().st_size, until=lambda size: size > 50_000, timeout_s=30)
        rotated.append(log.rename(log.with_suffix(f".{number}")))
        cri.call("ReopenContainerLog", container_id=container)
        assert log.exists()
        cri.call("ReopenContainerLog", container_id=container)  # nothing to do: it is the one in use
    sizes = [path.stat().st_size for path in rotated]
    cri.wait_exited(container)
    assert [path.stat().st_size for path in rotated] == sizes
    # a line that conmon did not read at once is in parts
    parts = [(line.tag, line.text) for path in (*rotated, log) for line in parse_log(path)]
    text = "".join(part if tag == "P" else f"{part}\n" for tag, part in parts)
    assert text == "".join(f"{number}\n" for number in range(1, lines + 1))


def test_exec_returns_output_and_exit_code(cri: Cri) -> None:
    pod = host_pod(cri, "exec", network=NODE)
    container = cri.run(pod, BUSYBOX, ["sleep", "1000"])
    done = cri.exec(container, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.code, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(grpc.RpcError, match="no/such"):
        cri.exec(container, "/no/such/program")
    with pytest.raises(grpc.RpcError) as caught:
        cri.exec(container, "sh", "-c", "sleep 4321 & setsid sleep 4321 & wait", timeout=1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "4321" not in cri.exec(container, "ps").stdout


def test_missing_program_fails_the_start(cri: Cri) -> None:
    pod = host_pod(cri, "absent", network=NODE)
    container = cri.create(pod, BUSYBOX, ["/no/such/program"])
    with pytest.raises(grpc.RpcError, match="no/such/program"):
        cri.start(container)
    status = cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (api.CONTAINER_EXITED, 128, "StartError")


def test_stop_sends_the_signal_then_kills(cri: Cri) -> None:
    pod = host_pod(cri, "stops", network=NODE, pid=NODE)
    script = "trap 'echo ending; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    asked = cri.run(pod, BUSYBOX, ["sh", "-c", script], linux=security(namespace_options=pod_options(pod)))
    eventually_sync(lambda: cri.log(asked), until=lambda lines: lines, timeout_s=30)
    cri.stop(asked)
    assert cri.status(asked).exit_code == 5
    stubborn = cri.run(
        pod,
        BUSYBOX,
        ["sh", "-c", "trap '' TERM; sleep 5555 & wait; sleep 5556"],
        linux=security(namespace_options=pod_options(pod)),
    )
    cri.stop(stubborn, timeout=0)
    assert cri.status(stubborn).exit_code == 137
    eventually_sync(lambda: processes_naming("sleep 555"), until=lambda found: not found, timeout_s=30)


def test_limits_are_in_force_and_usage_is_reported(cri: Cri) -> None:
    pod = host_pod(cri, "limits", network=NODE)
    busy = "x=$(head -c 30000000 /dev/zero | tr '\\0' x); while :; do :; done"
    resources = api.LinuxContainerResources(memory_limit_in_bytes=200 << 20, cpu_shares=512)
    container = cri.run(pod, BUSYBOX, ["sh", "-c", busy], linux=api.LinuxContainerConfig(resources=resources))

    def usage() -> api.ContainerStats:
        return cast(api.ContainerStats, cri.call("ContainerStats", container_id=container).stats)

    eventually_sync(
        usage, until=lambda stats: stats.memory.working_set_bytes.value > 25_000_000, timeout_s=30
    )
    assert 0.3 < rate(usage, 1.0) < 1.2, "a busy loop has about one CPU"
    second = usage()
    assert 25_000_000 < second.memory.working_set_bytes.value < 120_000_000
    assert second.memory.available_bytes.value < 200 << 20
    whole = cri.call("PodSandboxStats", pod_sandbox_id=pod.id).stats.linux
    assert whole.memory.working_set_bytes.value >= 25_000_000
    assert whole.process.process_count.value >= 1
    changed = api.LinuxContainerResources(
        memory_limit_in_bytes=150 << 20, cpu_quota=10_000, cpu_period=100_000
    )
    cri.call("UpdateContainerResources", container_id=container, linux=changed)
    assert cri.status(container).resources.linux.memory_limit_in_bytes == 150 << 20
    assert rate(usage, 0.3) < 0.2, "a tenth of a CPU"


def rate(usage: Callable[[], api.ContainerStats], used_s: float) -> float:
    """Return CPUs in use, averaged until the container has used this many seconds of CPU time."""

    def cpu_s() -> float:
        return usage().cpu.usage_core_nano_seconds.value / 1e9

    first, began = cpu_s(), time.monotonic()
    last = eventually_sync(cpu_s, until=lambda now: now - first >= used_s, timeout_s=60)
    return (last - first) / (time.monotonic() - began)


def test_container_above_its_memory_limit_is_oom_killed(cri: Cri) -> None:
    pod = host_pod(cri, "oom", network=NODE)
    resources = api.LinuxContainerResources(memory_limit_in_bytes=20 << 20)
    container = cri.run(
        pod,
        BUSYBOX,
        ["sh", "-c", "x=$(head -c 60000000 /dev/zero | tr '\\0' x); echo unheard"],
        linux=api.LinuxContainerConfig(resources=resources),
    )
    status = cri.wait_exited(container)
    assert status.reason == "OOMKilled"
    assert status.exit_code != 0


def test_port_forward_reaches_a_port_of_the_node(cri: Cri, daemon: Daemon) -> None:
    cri.pull(WEB)
    pod = host_pod(cri, "web", network=NODE)
    cri.run(pod, WEB, ["httpd", "-f", "-p", "127.0.0.1:18080", "-h", "/www"])

    def fetch() -> str:
        try:
            return str(daemon.namespace.fetch("127.0.0.1", 18080))
        except OSError:
            return ""

    assert eventually_sync(fetch, until=lambda got: got, timeout_s=30) == "hello from the pod\n"


def test_requested_mounts_are_made(cri: Cri, tmp_path: Path) -> None:
    id = cri.pull(WEB)
    (tmp_path / "inner").mkdir()
    (tmp_path / "file").write_text("of the host\n")
    (tmp_path / "link").symlink_to("file")
    pod = host_pod(cri, "mounts", network=NODE)

    def mount(target: str, source: str, **fields: Any) -> api.Mount:
        return api.Mount(container_path=target, host_path=str(tmp_path / source), **fields)

    container = cri.run(
        pod,
        BUSYBOX,
        ["sleep", "1000"],
        mounts=[
            mount("/rw", ""),
            mount("/ro", "", readonly=True),
            mount("/inert", "", mount_options=["noexec"]),
            mount("/etc/single", "link"),
            api.Mount(
                container_path="/image", image=api.ImageSpec(image=id), image_sub_path="www", readonly=True
            ),
        ],
    )
    run = cri.exec
    assert run(container, "sh", "-c", "echo new > /rw/new && cat /etc/single").stdout == "of the host\n"
    assert (tmp_path / "new").read_text() == "new\n"
    assert "Read-only" in run(container, "touch", "/ro/new").stderr
    assert "Read-only" in run(container, "touch", "/image/new").stderr
    assert run(container, "cat", "/image/index.html").stdout == "hello from the pod\n"
    assert "noexec" in run(container, "grep", " /inert ", "/proc/mounts").stdout
    with pytest.raises(grpc.RpcError, match=r"config\.mounts\[0\]\.propagation"):
        cri.create(
            pod,
            BUSYBOX,
            mounts=[mount("/both", "", propagation=api.PROPAGATION_BIDIRECTIONAL)],
            linux=security(privileged=True),
        )


def test_process_is_confined_as_in_a_vm(cri: Cri) -> None:
    pod = host_pod(cri, "confined", network=NODE)
    container = cri.run(
        pod,
        BUSYBOX,
        ["sleep", "1000"],
        linux=security(
            run_as_user=api.Int64Value(value=1234),
            run_as_group=api.Int64Value(value=4321),
            supplemental_groups=[55],
            no_new_privs=True,
            capabilities=api.Capability(drop_capabilities=["ALL"]),
            seccomp=api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault),
            masked_paths=["/proc/kcore"],
            readonly_paths=["/proc/sys"],
            readonly_rootfs=True,
        ),
    )
    status = dict(
        line.split(":", 1) for line in cri.exec(container, "cat", "/proc/self/status").stdout.splitlines()
    )
    assert status["Uid"].split() == ["1234"] * 4 and status["Gid"].split() == ["4321"] * 4
    assert "55" in status["Groups"].split()
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip(), int(status["CapEff"], 16)) == (
        "1",
        "2",
        0,
    )
    assert "Read-only" in cri.exec(container, "touch", "/new").stderr
    assert cri.exec(container, "sh", "-c", "head -c 1 /proc/kcore | wc -c").stdout.strip() == "0"


def test_container_in_the_pid_namespace_of_a_target_sees_its_processes(cri: Cri) -> None:
    pod = host_pod(cri, "target", network=NODE, pid=CONTAINER)
    seen = cri.run(
        pod,
        BUSYBOX,
        ["sleep", "2222"],
        linux=security(namespace_options=api.NamespaceOption(network=NODE, pid=CONTAINER)),
    )
    assert cri.exec(seen, "sh", "-c", "readlink /proc/1/exe; ls /proc | grep -c '^[0-9]'").stdout.split()[0]
    options = api.NamespaceOption(network=NODE, pid=TARGET, target_id=seen)
    observer = cri.run(pod, BUSYBOX, ["sleep", "3333"], linux=security(namespace_options=options))
    assert "sleep 2222" in cri.exec(observer, "ps").stdout


def test_limits_of_the_pod_are_in_force(cri: Cri) -> None:
    pod = host_pod(cri, "whole", network=NODE)
    cri.run(pod, BUSYBOX, ["sleep", "1000"])
    resources = api.LinuxContainerResources(memory_limit_in_bytes=300 << 20)
    cri.call("UpdatePodSandboxResources", pod_sandbox_id=pod.id, resources=resources)
    info = json.loads(cri.pod_status(pod, verbose=True).info["info"])
    limits = [
        path.read_text().strip()
        for name in ("memory.limit_in_bytes", "memory.max")
        for path in Path("/sys/fs/cgroup").rglob(f"husk-{pod.id}/{name}")
    ]
    assert limits == [str(300 << 20)] and info["cgroup"].endswith(f"husk-{pod.id}")


def test_privileged_container_has_devices_of_the_node(cri: Cri) -> None:
    pod = host_pod(cri, "devices", network=NODE, linux={})
    plain = cri.run(pod, BUSYBOX, ["sleep", "1000"])
    assert cri.exec(plain, "sh", "-c", "mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem").code != 0
    security_context = api.LinuxContainerSecurityContext(privileged=True)
    root = cri.run(
        pod, BUSYBOX, ["sleep", "1000"], linux=api.LinuxContainerConfig(security_context=security_context)
    )
    here = {path.name for path in Path("/dev").iterdir() if path.is_char_device() and not path.is_symlink()}
    there = set(cri.exec(root, "ls", "/dev").stdout.split())
    assert here - there <= {"ptmx", "console"}


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_pod_outlives_the_daemon(cri: Cri, daemon: Daemon, end: str) -> None:
    pod = host_pod(cri, f"lives-{end}", network=NODE)
    script = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done"
    writes = cri.run(pod, BUSYBOX, ["sh", "-c", script])
    ends = cri.run(pod, BUSYBOX, ["sh", "-c", "sleep 2; echo last words; exit 9"])
    made = cri.create(pod, BUSYBOX, ["sh", "-c", "exit 4"])
    pid = pid_of(cri, pod, writes)
    getattr(daemon, end)()
    eventually_sync(lambda: not processes_naming(f"--cid {ends}"), describe="the end of its conmon")
    ended_ns = time.time_ns()
    daemon.start()
    assert pid_of(cri, pod, writes) == pid
    status = cri.wait_exited(ends)
    assert (status.exit_code, [line.text for line in cri.log(ends)]) == (9, ["last words"])
    assert status.finished_at <= ended_ns, "when it ended, not when that was found"
    eventually_sync(lambda: cri.log(writes), until=lambda lines: len(lines) > 40, timeout_s=30)
    numbers = [int(line.text) for line in cri.log(writes)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 40
    assert cri.exec(writes, "echo", "here").stdout == "here\n"
    cri.start(made)
    assert cri.wait_exited(made).exit_code == 4


def test_container_whose_supervisor_is_killed_ends(cri: Cri) -> None:
    pod = host_pod(cri, "supervisor", network=NODE)
    container = cri.run(pod, BUSYBOX, ["sleep", "7777"])
    for each in processes_naming(f"--cid {container}"):
        os.kill(int(each.split()[0]), signal.SIGKILL)
    status = cri.wait_exited(container)
    assert (status.exit_code, status.reason) == (137, "Error")
    eventually_sync(lambda: processes_naming("sleep 7777"), until=lambda found: not found, timeout_s=30)


def test_pod_whose_first_process_is_killed_is_not_ready(cri: Cri) -> None:
    pod = host_pod(cri, "first", network=NODE)
    container = cri.run(pod, BUSYBOX, ["sleep", "1000"])
    info = json.loads(cri.pod_status(pod, verbose=True).info["info"])
    os.kill(info["pid"], signal.SIGKILL)
    eventually_sync(
        lambda: cri.pod_status(pod).status.state,
        until=lambda state: state == api.SANDBOX_NOTREADY,
        timeout_s=30,
    )
    assert cri.wait_exited(container).exit_code == 137


def pod_options(pod: Pod) -> api.NamespaceOption:
    return pod.config.linux.security_context.namespace_options


def pid_of(cri: Cri, pod: Pod, container: str) -> int:
    info = json.loads(cri.pod_status(pod, verbose=True).info["info"])
    assert info["isolation"] == "process"
    return int(info["containerPids"][container])


def shares(one: int, other: int, kind: str) -> bool:
    return Path(f"/proc/{one}/ns/{kind}").readlink() == Path(f"/proc/{other}/ns/{kind}").readlink()
