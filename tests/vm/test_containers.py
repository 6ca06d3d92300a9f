"""Containers: exec, exit codes, users, capabilities, file systems, seccomp, limits, on the real daemon."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit.cri import Cri, Pod
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SETUID = f"{HOST}/husk/setuid:1"
SLEEP = ("sleep", "3600")

Outcome = Callable[..., tuple[int, str]]


def security(**fields: Any) -> api.LinuxContainerConfig:
    return api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(**fields))


def resources(**fields: Any) -> api.LinuxContainerConfig:
    return api.LinuxContainerConfig(resources=api.LinuxContainerResources(**fields))


def number(value: int) -> api.Int64Value:
    return api.Int64Value(value=value)


@pytest.fixture
def outcome(cri: Cri, pod: Pod) -> Outcome:
    """Runs a shell script in a new container; gives its exit code and output."""

    def run(script: str, *, image: str = BUSYBOX, **fields: Any) -> tuple[int, str]:
        return cri.run_to_end(pod, image, ["sh", "-c", script], **fields)

    return run


@pytest.fixture
def box(cri: Cri, pod: Pod) -> str:
    return cri.run(pod, BUSYBOX, SLEEP)


# ------------------------------------------------------------------------- states and codes


def test_container_killed_while_it_starts_exits_and_is_removed(cri: Cri, pod: Pod, tmp_path: Path) -> None:
    """The guest's kernel is about to release their files when their file systems go."""
    for number in range(20):
        (tmp_path / f"f{number}").write_bytes(bytes(1 << 20))
    mount = api.Mount(container_path="/v", host_path=str(tmp_path))
    busy = "for i in 0 1 2 3 4 5 6 7 8 9; do while :; do cat /v/f$i /v/f1$i >/dev/null; done & done; wait"
    for number in range(60):
        command = SLEEP if number % 2 else ("sh", "-c", busy)
        container = cri.create(pod, BUSYBOX, command, name=f"killed-{number}", mounts=[mount])
        cri.start(container)
        cri.stop(container, timeout=0)
        cri.remove(container)


def test_container_states_from_create_to_remove(cri: Cri, pod: Pod) -> None:
    container = cri.create(pod, BUSYBOX, SLEEP, labels={"a": "b"}, annotations={"c": "d"})
    created = cri.status(container)
    assert (created.state, created.started_at, created.finished_at) == (api.CONTAINER_CREATED, 0, 0)
    cri.start(container)
    running = cri.status(container)
    assert running.state == api.CONTAINER_RUNNING
    assert running.created_at <= running.started_at
    assert (dict(running.labels), dict(running.annotations)) == ({"a": "b"}, {"c": "d"})
    with pytest.raises(grpc.RpcError):
        cri.start(container)
    cri.stop(container, timeout=0)
    ended = cri.status(container)
    assert (ended.state, ended.exit_code, ended.reason) == (api.CONTAINER_EXITED, 137, "Error")
    assert ended.finished_at >= ended.started_at
    cri.remove(container)
    cri.remove(container)
    with pytest.raises(grpc.RpcError) as fault:
        cri.status(container)
    assert fault.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("script", "code", "reason"), [("exit 0", 0, "Completed"), ("exit 42", 42, "Error")])
def test_exit_code_and_reason_are_reported(cri: Cri, pod: Pod, script: str, code: int, reason: str) -> None:
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script])
    status = cri.wait_exited(container)
    assert (status.exit_code, status.reason) == (code, reason)


def test_stop_sends_term_and_waits(cri: Cri, pod: Pod) -> None:
    script = "trap 'echo ending; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script])
    eventually_sync(lambda: cri.log(container), timeout_s=30)
    cri.stop(container, timeout=20)
    assert cri.status(container).exit_code == 5
    assert [line.text for line in cri.log(container)] == ["ready", "ending"]


def test_missing_program_is_a_start_error(cri: Cri, pod: Pod) -> None:
    container = cri.create(pod, BUSYBOX, ["/no/such/program"])
    with pytest.raises(grpc.RpcError) as fault:
        cri.start(container)
    assert "/no/such/program" in str(fault.value.details())
    status = cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (api.CONTAINER_EXITED, 128, "StartError")
    assert status.message


def test_create_before_start_can_be_removed(cri: Cri, pod: Pod) -> None:
    container = cri.create(pod, BUSYBOX, SLEEP)
    cri.stop(container)
    cri.remove(container)
    assert container not in [each.id for each in cri.call("ListContainers").containers]


def test_create_with_name_in_use_is_refused(cri: Cri, pod: Pod) -> None:
    cri.create(pod, BUSYBOX, SLEEP, name="taken")
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, BUSYBOX, SLEEP, name="taken")
    assert fault.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_unknown_ids_are_not_found_and_stop_and_remove_succeed(cri: Cri) -> None:
    calls: dict[str, dict[str, Any]] = {
        "ContainerStatus": {},
        "StartContainer": {},
        "ExecSync": {"cmd": ["true"]},
        "ContainerStats": {},
        "UpdateContainerResources": {},
        "ReopenContainerLog": {},
    }
    for name, fields in calls.items():
        with pytest.raises(grpc.RpcError) as fault:
            cri.call(name, container_id="0" * 64, **fields)
        assert fault.value.code() == grpc.StatusCode.NOT_FOUND, name
    cri.stop("0" * 64)
    cri.remove("0" * 64)


# ------------------------------------------------------------------------------------- exec


def test_exec_returns_exit_code_and_both_outputs(cri: Cri, box: str) -> None:
    answer = cri.exec(box, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (answer.code, answer.stdout, answer.stderr) == (3, "out\n", "err\n")


def test_exec_killed_by_a_signal_returns_128_plus_its_number(cri: Cri, box: str) -> None:
    assert cri.exec(box, "sh", "-c", "kill -9 $$").code == 137


def test_exec_of_missing_program_fails(cri: Cri, box: str) -> None:
    with pytest.raises(grpc.RpcError):
        cri.exec(box, "/no/such/program")


def test_exec_timeout_kills_the_whole_tree(cri: Cri, box: str) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        cri.exec(box, "sh", "-c", "sleep 4321 & sleep 4321", timeout=1)
    assert fault.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually_sync(
        lambda: cri.exec(box, "ps").stdout,
        until=lambda processes: "sleep 4321" not in processes,
        timeout_s=10,
    )


def test_exec_returns_large_output(cri: Cri, box: str) -> None:
    answer = cri.exec(box, "sh", "-c", "yes 0123456789abcde | head -c 4000000")
    assert (answer.code, len(answer.stdout)) == (0, 4_000_000)


def test_exec_before_start_and_after_exit_is_refused(cri: Cri, pod: Pod) -> None:
    container = cri.create(pod, BUSYBOX, ["true"])
    with pytest.raises(grpc.RpcError):
        cri.exec(container, "true")
    cri.start(container)
    cri.wait_exited(container)
    with pytest.raises(grpc.RpcError):
        cri.exec(container, "true")


# ------------------------------------------------------------------------ what the pod shares


def test_containers_of_a_pod_share_network_and_hostname(cri: Cri, pod: Pod) -> None:
    first, second = (cri.run(pod, BUSYBOX, SLEEP) for _ in range(2))
    cri.exec(first, "sh", "-c", "mkdir /w; echo shared >/w/index.html; httpd -p 127.0.0.1:8099 -h /w")
    assert cri.exec(second, "wget", "-qO-", "http://127.0.0.1:8099/").stdout == "shared\n"
    for name in ("net", "ipc", "uts"):
        links = {cri.exec(each, "readlink", f"/proc/self/ns/{name}").stdout for each in (first, second)}
        assert len(links) == 1, name


def test_containers_of_a_pod_share_dev_shm(cri: Cri, pod: Pod) -> None:
    first, second = (cri.run(pod, BUSYBOX, SLEEP) for _ in range(2))
    cri.exec(first, "sh", "-c", "echo shared >/dev/shm/note")
    assert cri.exec(second, "cat", "/dev/shm/note").stdout == "shared\n"
    mount = next(
        line.split()
        for line in cri.exec(first, "cat", "/proc/mounts").stdout.splitlines()
        if line.split()[1] == "/dev/shm"
    )
    assert mount[2] == "tmpfs"
    assert "size=65536k" in mount[3].split(",")
    assert cri.exec(first, "stat", "-c", "%a", "/dev/shm").stdout == "1777\n"


def test_pid_mode_container_hides_other_containers(cri: Cri, pod: Pod) -> None:
    container = cri.run(
        pod,
        BUSYBOX,
        SLEEP,
        linux=security(namespace_options=api.NamespaceOption(pid=api.CONTAINER)),
    )
    assert cri.exec(container, "cat", "/proc/1/cmdline").stdout == "sleep\x003600\x00"


def test_pid_mode_pod_shows_other_containers(cri: Cri) -> None:
    option = api.NamespaceOption(pid=api.POD)
    pod = cri.run_pod(
        "shared-pid",
        linux=api.LinuxPodSandboxConfig(
            security_context=api.LinuxSandboxSecurityContext(namespace_options=option)
        ),
    )
    cri.run(pod, BUSYBOX, ["sleep", "7654"], linux=security(namespace_options=option))
    second = cri.run(pod, BUSYBOX, SLEEP, linux=security(namespace_options=option))
    assert "sleep 7654" in cri.exec(second, "ps").stdout


# ------------------------------------------------------------------------------------ users


def test_process_has_the_users_and_groups_of_the_request(outcome: Outcome) -> None:
    ids = "echo $(id -u) $(id -g) $(id -G)"
    pid = api.NamespaceOption(pid=api.CONTAINER)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "0 0 0"),
        ({"run_as_user": number(1000)}, "1000 1000 1000 50000"),
        ({"run_as_username": "worker"}, "1000 1000 1000 50000"),
        ({"run_as_user": number(4242)}, "4242 0 0"),
        ({"run_as_user": number(1000), "run_as_group": number(33)}, "1000 33 33 50000"),
        ({"run_as_user": number(1000), "supplemental_groups": [7]}, "1000 1000 1000 7 50000"),
    ]
    for fields, wanted in cases:
        code, text = outcome(ids, linux=security(namespace_options=pid, **fields))
        uid, gid, *groups = text.split()
        wanted_uid, wanted_gid, *wanted_groups = wanted.split()
        assert code == 0
        assert (uid, gid, set(groups)) == (wanted_uid, wanted_gid, set(wanted_groups)), fields


def test_strict_groups_policy_ignores_the_groups_of_the_image(outcome: Outcome) -> None:
    strict = security(
        run_as_user=number(1000), supplemental_groups=[7], supplemental_groups_policy=api.Strict
    )
    _, text = outcome("id -G", linux=strict)
    assert set(text.split()) == {"1000", "7"}


def test_status_and_exec_have_the_same_user(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP, linux=security(run_as_username="worker"))
    user = cri.status(container).user.linux
    assert (user.uid, user.gid, set(user.supplemental_groups)) == (1000, 1000, {1000, 50000})
    assert cri.exec(container, "id", "-u").stdout == "1000\n"


def test_group_without_user_and_unknown_user_are_refused(cri: Cri, pod: Pod) -> None:
    for fields, word in (
        ({"run_as_group": number(5)}, "run_as_group"),
        ({"run_as_username": "absent-user"}, "absent-user"),
    ):
        with pytest.raises(grpc.RpcError) as fault:
            cri.run(pod, BUSYBOX, SLEEP, linux=security(**fields))
        assert word in str(fault.value.details())


def test_no_new_privs_disables_set_user_id(cri: Cri, pod: Pod) -> None:
    cri.pull(SETUID)
    texts = {
        value: cri.run_to_end(pod, SETUID, ["effective"], linux=security(no_new_privs=value))[1]
        for value in (False, True)
    }
    assert "uid=1000 euid=0" in texts[False]
    assert "uid=1000 euid=1000" in texts[True]


# --------------------------------------------------------------------------------- security

CHOWN, NET_ADMIN, SYS_ADMIN = 0, 12, 21


@pytest.mark.parametrize(
    ("change", "has", "lacks"),
    [
        ({}, {CHOWN}, {NET_ADMIN, SYS_ADMIN}),
        ({"add_capabilities": ["NET_ADMIN"]}, {CHOWN, NET_ADMIN}, {SYS_ADMIN}),
        ({"drop_capabilities": ["CHOWN"]}, set(), {CHOWN, NET_ADMIN}),
        ({"add_capabilities": ["ALL"]}, {CHOWN, NET_ADMIN, SYS_ADMIN}, set()),
        ({"drop_capabilities": ["ALL"]}, set(), {CHOWN, NET_ADMIN, SYS_ADMIN}),
    ],
)
def test_process_has_the_capabilities_of_the_request(
    outcome: Outcome, change: dict[str, list[str]], has: set[int], lacks: set[int]
) -> None:
    _, text = outcome("grep CapEff /proc/self/status", linux=security(capabilities=api.Capability(**change)))
    effective = int(text.split()[1], 16)
    held = {bit for bit in range(64) if effective >> bit & 1}
    assert (has - held, lacks & held) == (set(), set())


def test_privileged_container_has_sys_admin_and_a_writable_sysfs(cri: Cri) -> None:
    sandbox = api.LinuxSandboxSecurityContext(privileged=True)
    pod = cri.run_pod("privileged", linux=api.LinuxPodSandboxConfig(security_context=sandbox))
    script = "grep CapEff /proc/self/status; grep ' /sys sysfs' /proc/mounts"
    _, text = cri.run_to_end(pod, BUSYBOX, ["sh", "-c", script], linux=security(privileged=True))
    assert int(text.split()[1], 16) >> SYS_ADMIN & 1
    assert " /sys sysfs rw" in text


def test_readonly_rootfs_refuses_writes(outcome: Outcome) -> None:
    code, text = outcome("touch /x", linux=security(readonly_rootfs=True))
    assert code != 0
    assert "Read-only file system" in text
    assert outcome("touch /x")[0] == 0


def test_masked_and_readonly_paths_are_in_force(outcome: Outcome) -> None:
    _, text = outcome(
        "cat /proc/meminfo | wc -c; ls /etc | wc -l; echo x >/proc/sys/kernel/hostname",
        linux=security(masked_paths=["/proc/meminfo", "/etc"], readonly_paths=["/proc/sys"]),
    )
    assert text.split()[:2] == ["0", "0"]
    assert "Read-only file system" in text


def test_seccomp_profile_is_in_force(outcome: Outcome, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    rule = {"names": ["chmod", "fchmodat", "fchmod", "fchmodat2"], "action": "SCMP_ACT_ERRNO"}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    kinds = api.SecurityProfile
    script = "grep ^Seccomp: /proc/self/status; chmod 700 /tmp"

    def seccomp(**fields: Any) -> str:
        return outcome(script, linux=security(seccomp=kinds(**fields)))[1]

    assert outcome(script)[1].split() == ["Seccomp:", "0"]
    assert seccomp(profile_type=kinds.Unconfined).split() == ["Seccomp:", "0"]
    assert seccomp(profile_type=kinds.RuntimeDefault).split() == ["Seccomp:", "2"]
    blocked = seccomp(profile_type=kinds.Localhost, localhost_ref=str(profile))
    assert "Operation not permitted" in blocked


# ------------------------------------------------------------------------------------ files


def test_mounts_share_files_with_the_host_both_ways(cri: Cri, pod: Pod, tmp_path: Path) -> None:
    folder, single = tmp_path / "folder", tmp_path / "single"
    folder.mkdir()
    (folder / "inside").write_text("one")
    single.write_text("first\n")
    container = cri.run(
        pod,
        BUSYBOX,
        SLEEP,
        mounts=[
            api.Mount(container_path="/data", host_path=str(folder)),
            api.Mount(container_path="/fixed", host_path=str(folder), readonly=True),
            api.Mount(container_path="/etc/single", host_path=str(single)),
        ],
    )
    assert cri.exec(container, "cat", "/data/inside", "/etc/single").stdout == "onefirst\n"
    cri.exec(container, "sh", "-c", "echo from the pod >/data/new; echo second >>/etc/single")
    assert (folder / "new").read_text() == "from the pod\n"
    assert single.read_text() == "first\nsecond\n"
    (folder / "later").write_text("from the host\n")
    eventually_sync(
        lambda: cri.exec(container, "cat", "/data/later").stdout,
        until=lambda text: text == "from the host\n",
        timeout_s=5,
    )
    refused = cri.exec(container, "touch", "/fixed/x")
    assert "Read-only file system" in refused.stderr
    mounts = {each.container_path: each for each in cri.status(container).mounts}
    assert mounts["/fixed"].readonly
    assert mounts["/data"].host_path == str(folder)


def test_missing_mount_source_is_refused(cri: Cri, pod: Pod, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(grpc.RpcError) as fault:
        cri.run(pod, BUSYBOX, SLEEP, mounts=[api.Mount(container_path="/x", host_path=str(gone))])
    assert str(gone) in str(fault.value.details())


def test_root_filesystems_of_containers_are_separate(cri: Cri, pod: Pod) -> None:
    first, second = (cri.run(pod, BUSYBOX, SLEEP) for _ in range(2))
    cri.exec(first, "sh", "-c", "echo mine >/etc/own; rm /etc/image-mark")
    assert cri.exec(second, "cat", "/etc/own").code != 0
    assert cri.exec(second, "cat", "/etc/image-mark").stdout == "busybox\n"


def test_environment_arguments_and_directory_are_those_of_the_request(cri: Cri, pod: Pod) -> None:
    script = 'echo "$1" "$WORDS" "$PWD"'
    code, text = cri.run_to_end(
        pod,
        BUSYBOX,
        ["sh", "-c", script, "sh", "an argument with  spaces"],
        env={"WORDS": "a 'quoted' value"},
        working_dir="/made/again",
    )
    assert (code, text) == (0, "an argument with  spaces a 'quoted' value /made/again\n")


def test_image_configuration_applies_without_a_request(cri: Cri, pod: Pod) -> None:
    cri.pull(SETUID)
    code, text = cri.run_to_end(pod, SETUID, [])
    assert (code, text.split()[0]) == (0, "uid=1000")


# ----------------------------------------------------------------------------------- limits


def test_out_of_memory_is_reported_as_oom_killed(cri: Cri, pod: Pod) -> None:
    eat = ["dd", "if=/dev/zero", "of=/dev/null", "bs=120M", "count=1"]
    container = cri.run(pod, BUSYBOX, eat, linux=resources(memory_limit_in_bytes=32 << 20))
    status = cri.wait_exited(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


def test_out_of_memory_of_a_child_is_reported_as_oom_killed(cri: Cri, pod: Pod) -> None:
    script = "dd if=/dev/zero of=/dev/null bs=120M count=1; exit 137"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script], linux=resources(memory_limit_in_bytes=32 << 20))
    assert cri.wait_exited(container).reason == "OOMKilled"


def test_updated_limits_are_in_force_and_shown(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP, linux=resources(memory_limit_in_bytes=64 << 20))
    limits = api.LinuxContainerResources(memory_limit_in_bytes=48 << 20, cpu_quota=50_000, cpu_period=100_000)
    cri.call("UpdateContainerResources", container_id=container, linux=limits)
    shown = cri.status(container).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_quota) == (48 << 20, 50_000)
    eat = "dd if=/dev/zero of=/dev/null bs=56M count=1"
    assert cri.exec(container, *shlex.split(eat)).code == 137


def test_stats_show_cpu_and_memory_in_status_and_list(cri: Cri, pod: Pod) -> None:
    container = cri.run(
        pod, BUSYBOX, ["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 3600"]
    )
    stats = eventually_sync(
        lambda: cri.call("ContainerStats", container_id=container).stats,
        until=lambda each: (
            each.cpu.usage_core_nano_seconds.value > 0 and each.memory.working_set_bytes.value > 0
        ),
        timeout_s=30,
    )
    assert stats.attributes.id == container
    assert stats.cpu.timestamp > 0
    listed = cri.call("ListContainerStats", filter=api.ContainerStatsFilter(id=container)).stats
    assert [each.attributes.id for each in listed] == [container]


def test_oom_score_adj_is_that_of_the_request(outcome: Outcome) -> None:
    _, text = outcome("cat /proc/self/oom_score_adj", linux=resources(oom_score_adj=321))
    assert text == "321\n"
