"""The agent's containers: how they start, what a process gets, and how they end."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import GuestError
from sandbox.guest import guest_pb2 as pb
from sandbox.host.mount_flags import MS_BIND
from tests.kit.agent import ALL_CAPS, Agent, Guest, Sink, process, start
from tests.kit.eventually import eventually

POD, TARGET = pb.PidNamespace.POD, pb.PidNamespace.TARGET
CAP_NET_RAW, CAP_SETUID = 1 << 13, 1 << 7


def status_of(lines: list[str]) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$; sleep 9", None), ("exit 255", 255)]
)
async def test_exit_code_of_a_script_is_reported(guest: Guest, script: str, code: int | None) -> None:
    # process 1 of a PID namespace cannot kill itself (pid_namespaces(7)); in the pod's namespace it is not 1
    got, _ = await guest.sh(script, pid_namespace=POD)
    assert got == (137 if code is None else code)


@pytest.mark.parametrize("number", [1, 9, 15])
async def test_exit_code_after_a_signal_is_128_plus_its_number(guest: Guest, number: int) -> None:
    id = await guest.start(["sh", "-c", "trap - 1 15; exec sleep 100"], pid_namespace=POD)
    await guest.call(signal=pb.Signal(container_id=id, signal=number))
    exited = await guest.exited(id)
    assert exited.exit_code == 128 + number
    assert exited.at_ns > 0


async def refused(guest: Guest, argv: list[str], **more: Any) -> GuestError:
    with pytest.raises(GuestError) as caught:
        await guest.start(argv, **more)
    return caught.value


async def test_start_with_missing_command_fails(guest: Guest) -> None:
    error = await refused(guest, ["no-such-program"])
    assert (error.step, error.errno) == ("exec", 2)
    assert error.message == "no-such-program: No such file or directory"


async def test_start_with_a_file_that_is_not_a_program_fails(guest: Guest) -> None:
    assert (await refused(guest, ["/etc/secret"])).errno == 13  # not executable
    assert (await refused(guest, ["/tmp"])).errno == 13  # a directory
    assert (await refused(guest, [])).step == "exec"


async def test_start_with_missing_working_directory_fails_unless_it_is_made(guest: Guest) -> None:
    error = await refused(guest, ["true"], process=process(["true"], cwd="/no/such"))
    assert (error.step, error.errno) == ("chdir", 2)
    made = process(["sh", "-c", "pwd"], cwd="/no/such", make_cwd=True)
    assert await guest.run(["true"], process=made) == (0, ["/no/such"])


async def test_command_is_searched_in_the_containers_path(guest: Guest) -> None:
    rootfs = guest.agent.rootfs()
    (rootfs / "opt").mkdir()
    (rootfs / "opt/tool").symlink_to("/bin/echo")
    (rootfs / "opt/echo").symlink_to("/bin/busybox")
    found = process(["echo", "found"], env=[b"PATH=/absent:/opt:/bin"])
    assert await guest.run([], rootfs=rootfs, process=found) == (0, ["found"])
    error = await refused(guest, [], rootfs=rootfs, process=process(["echo"], env=[b"PATH=/absent"]))
    assert error.errno == 2


async def test_start_that_failed_leaves_nothing(agent: Agent, guest: Guest) -> None:
    id, rootfs = guest.name(), agent.rootfs()
    file = pb.File(path="/etc/hosts", content=b"x", mode=0o644)
    for _ in range(2):  # the second one would find what the first one left
        error = await refused(guest, ["nope"], id=id, rootfs=rootfs, files=[file])
        assert error.step == "exec"
    assert not (agent.cgroup / "husk" / id).exists()
    assert agent.run_inside("ls", "/run/husk/files") == ""
    assert await guest.run(["true"], id=id, rootfs=rootfs, files=[file]) == (0, [])


@pytest.mark.parametrize(
    ("more", "step"),
    [
        ({"mounts": [pb.Mount(source="/no/such", target="/x", flags=MS_BIND)]}, "mount source"),
        ({"mounts": [pb.Mount(target="/x", type="nofs", make=pb.Mount.DIRECTORY)]}, "mount /x"),
        ({"mounts": [pb.Mount(target="/missing", type="tmpfs")]}, "mount /missing"),
        ({"rootfs": Path("/no/such")}, "rootfs"),
        ({"devices": [pb.Device(path="/dev/x/..", type=0o020000)]}, "path /dev/x/.."),
        ({"device_filter": bytes(8)}, "device filter"),
        ({"cgroup": [pb.CgroupFile(name="cgroup.max.depth", value="nonsense")]}, "cgroup cgroup.max.depth"),
        ({"cgroup": [pb.CgroupFile(name="../cgroup.procs", value="0")]}, "cgroup ../cgroup.procs"),
        ({"pid_namespace": TARGET, "pid_target": "unknown"}, "pid namespace"),
        ({"process": process(["true"], seccomp=b"odd")}, "seccomp"),
        ({"process": process(["true"], rlimits=[pb.Rlimit(resource=99)])}, "rlimit 99"),
        ({"process": process(["true"], cap_inheritable=1, cap_bounding=0, cap_permitted=0)}, "capset"),
    ],
)
async def test_start_that_failed_names_the_step_and_is_undone(
    agent: Agent, guest: Guest, more: dict[str, Any], step: str
) -> None:
    id = guest.name()
    assert (await refused(guest, ["true"], id=id, **more)).step == step
    assert not (agent.cgroup / "husk" / id).exists()


async def test_start_with_an_invalid_id_is_refused(guest: Guest) -> None:
    for bad in ("..", "a/b", "", ".hidden", "x" * 200):
        with pytest.raises(GuestError) as caught:
            await guest.call(start=start(bad, guest.agent.rootfs(), ["true"]))
        assert caught.value.step == "start"


async def test_start_with_an_id_in_use_is_refused(guest: Guest) -> None:
    id = await guest.start(["sleep", "100"])
    error = await refused(guest, ["true"], id=id)
    assert (error.step, error.errno) == ("start", 17)
    assert (await guest.exec(id, ["true"]))[0] == 0  # the first one still runs


async def test_environment_of_one_megabyte_is_passed(guest: Guest) -> None:
    env = [b"PATH=/bin", *(b"V%d=" % number + b"x" * 1000 for number in range(1000))]
    code, lines = await guest.run([], process=process(["sh", "-c", "env | wc -c; echo ${#V999}"], env=env))
    assert code == 0
    assert int(lines[0]) > 1_000_000
    assert lines[1] == "1000"


async def test_process_gets_its_ids_and_capabilities(guest: Guest) -> None:
    wanted = process(
        ["cat", "/proc/self/status"],
        uid=1000,
        gid=1001,
        groups=[7, 8],
        cap_bounding=CAP_NET_RAW | CAP_SETUID,
        cap_permitted=CAP_NET_RAW,
        cap_effective=CAP_NET_RAW,
        cap_inheritable=CAP_NET_RAW,
        cap_ambient=CAP_NET_RAW,
        no_new_privs=True,
        umask=0o077,
    )
    status = status_of((await guest.run([], process=wanted))[1])
    assert status["Uid"].split() == ["1000"] * 4
    assert status["Gid"].split() == ["1001"] * 4
    assert status["Groups"].split() == ["7", "8"]
    assert status["NoNewPrivs"] == "1"
    assert status["Umask"] == "0077"
    assert int(status["CapBnd"], 16) == CAP_NET_RAW | CAP_SETUID
    for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
        assert int(status[name], 16) == CAP_NET_RAW, name


async def test_root_with_fewer_capabilities(guest: Guest) -> None:
    wanted = process(["cat", "/proc/self/status"], cap_bounding=CAP_NET_RAW, cap_permitted=CAP_NET_RAW)
    wanted.cap_effective = CAP_NET_RAW
    status = status_of((await guest.run([], process=wanted))[1])
    assert int(status["CapEff"], 16) == CAP_NET_RAW
    assert status["SigBlk"] == status["SigIgn"] == "0" * 16
    assert status["Umask"] == "0022"


def seccomp_filter(number: int, errno: int) -> bytes:
    """Return an x86-64 filter that fails one system call and allows all others."""
    instructions = [
        (0x20, 0, 0, 0),  # load the number
        (0x15, 0, 1, number),
        (0x06, 0, 0, 0x00050000 | errno),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    return b"".join(struct.pack("<HBBI", *each) for each in instructions)


@pytest.mark.parametrize("no_new_privs", [False, True])
async def test_seccomp_filter_may_deny_what_the_agent_needs_before_it(
    guest: Guest, no_new_privs: bool
) -> None:
    """capset (126) is denied: the agent must call it before it installs the filter."""
    for denied in (83, 126):  # mkdir
        wanted = process(
            ["sh", "-c", "mkdir /tmp/x; cat /proc/self/status"],
            uid=1000,
            cap_permitted=0,
            cap_effective=0,
            cap_bounding=0,
            seccomp=seccomp_filter(denied, 42),
            no_new_privs=no_new_privs,
        )
        code, lines = await guest.run([], process=wanted, rootfs=writable_tmp(guest))
        status = status_of(lines)
        assert (code, status["Seccomp"]) == (0, "2")
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert any("mkdir" in line for line in lines) == (denied == 83)


def writable_tmp(guest: Guest) -> Path:
    rootfs = guest.agent.rootfs()
    (rootfs / "tmp").chmod(0o1777)
    return rootfs


async def test_rlimits_are_applied(guest: Guest) -> None:
    wanted = process(
        ["sh", "-c", "ulimit -n; ulimit -Hn"], rlimits=[pb.Rlimit(resource=7, soft=100, hard=200)]
    )
    assert await guest.run([], process=wanted) == (0, ["100", "200"])


def bpf(*instructions: tuple[int, int, int, int]) -> bytes:
    """Assemble eBPF: opcode, registers (source << 4 | destination), jump, constant."""
    return b"".join(struct.pack("<BBhi", *each) for each in instructions)


async def test_device_filter_denies_opening_a_device(guest: Guest) -> None:
    """The filter allows mknod, which the container's /dev needs, and denies every open."""
    only_mknod = bpf(
        (0x61, 0x12, 0, 0),  # r2 = access << 16 | type
        (0x77, 0x02, 0, 16),
        (0xB7, 0x00, 0, 1),
        (0x15, 0x02, 1, 1),  # BPF_DEVCG_ACC_MKNOD
        (0xB7, 0x00, 0, 0),
        (0x95, 0x00, 0, 0),
    )
    code, lines = await guest.run(["cat", "/dev/zero"], device_filter=only_mknod)
    assert code != 0
    assert "Operation not permitted" in lines[0]


async def test_container_pid_namespace_shows_only_its_processes(guest: Guest) -> None:
    _, lines = await guest.sh("echo $$; ls -d /proc/[0-9]*")
    assert lines[0] == "1"
    assert set(lines[1:]) <= {"/proc/1", "/proc/2"}


async def test_pod_pid_namespace_shows_the_pods_processes(guest: Guest) -> None:
    first = await guest.start(["sleep", "4321"], pid_namespace=POD)
    _, lines = await guest.sh("echo $$; cat /proc/[0-9]*/cmdline; echo; ls /proc/1/root", pid_namespace=POD)
    assert lines[0] != "1"
    assert "sleep\0" + "4321" in lines[1]
    assert lines[1].startswith("husk-pod-init")
    assert len(lines) == 2, "the root of the pod's init is empty"
    await guest.remove(first)


async def test_background_processes_in_the_pod_namespace_end_with_their_container(guest: Guest) -> None:
    code, _ = await guest.sh("sleep 7654 & exit 3", pid_namespace=POD)
    assert code == 3
    _, lines = await guest.sh("cat /proc/[0-9]*/cmdline", pid_namespace=POD)
    assert "7654" not in "".join(lines)


async def test_target_pid_namespace_shows_the_targets_processes(guest: Guest) -> None:
    first = await guest.start(["sleep", "100"])
    _, lines = await guest.sh("cat /proc/1/cmdline", pid_namespace=TARGET, pid_target=first)
    assert lines == ["sleep\0" + "100\0"]


async def test_orphaned_processes_are_reaped(agent: Agent, guest: Guest) -> None:
    """The pod's init reaps them; in a container's namespace they end with its first process."""
    for _ in range(20):
        await guest.sh("(sleep 0.01 & sleep 0.01 &) ; sleep 0.05", pid_namespace=POD)
        await guest.sh("(sleep 100 & sleep 100 &) ; exit 0")

    def zombies() -> bool:
        return " Z " in agent.run_inside("sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null || true")

    await eventually(lambda: not zombies(), describe="no zombie is left")


async def test_remove_kills_all_processes_and_is_idempotent(agent: Agent, guest: Guest) -> None:
    id = await guest.start(["sh", "-c", "sleep 1000 & sleep 1000"], pid_namespace=POD)
    await asyncio.gather(*(guest.remove(id) for _ in range(3)))
    await guest.remove(id)
    await guest.remove("never-was")
    assert not (agent.cgroup / "husk" / id).exists()
    assert (await guest.exited(id)).exit_code == 137


async def test_remove_with_nested_cgroups_removes_them(agent: Agent, guest: Guest) -> None:
    id = await guest.start(["sleep", "1000"])
    (agent.cgroup / "husk" / id / "a/b/c").mkdir(parents=True)
    await guest.remove(id)
    assert not (agent.cgroup / "husk" / id).exists()


async def start_until_ready(guest: Guest, script: str) -> str:
    """Start a container and wait until its script prints "ready"."""
    sink = Sink(guest.client)
    id = await guest.start(["sh", "-c", script], log_stream=sink.stream, log_window=sink.window)
    await sink.read(lambda seen: b"ready" in seen)
    return id


async def test_signal_reaches_the_first_process(guest: Guest) -> None:
    script = "trap 'echo got it; exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    id = await start_until_ready(guest, script)
    await guest.call(signal=pb.Signal(container_id=id, signal=15))
    assert (await guest.exited(id)).exit_code == 5
    for signal in (pb.Signal(container_id=id, signal=15), pb.Signal(container_id="unknown", signal=15)):
        with pytest.raises(GuestError) as caught:
            await guest.call(signal=signal)
        assert (caught.value.step, caught.value.errno) == ("signal", 3)


async def test_signal_with_all_reaches_every_process(guest: Guest) -> None:
    id = await guest.start(["sh", "-c", "sleep 1000 & sleep 1000"])
    await guest.call(signal=pb.Signal(container_id=id, signal=9, all=True))
    assert (await guest.exited(id)).exit_code == 137
    script = "(trap 'exit 1' TERM; echo ready; while :; do sleep 0.01; done) & wait $!; exit 9"
    id = await start_until_ready(guest, script)
    await guest.call(signal=pb.Signal(container_id=id, signal=15, all=True))
    assert (await guest.exited(id)).exit_code in (9, 143)


async def test_cgroup_files_are_written_and_read(agent: Agent, guest: Guest) -> None:
    id = await guest.start(["sleep", "100"], cgroup=[pb.CgroupFile(name="cgroup.max.depth", value="5")])
    await guest.call(
        write_cgroup=pb.WriteCgroup(
            container_id=id, files=[pb.CgroupFile(name="cgroup.max.descendants", value="6")]
        )
    )
    reply = await guest.call(
        read_cgroup=pb.ReadCgroup(
            container_ids=[id, "gone", ""],
            names=["cgroup.max.depth", "cgroup.max.descendants", "no.such"],
            paths=["/proc/self/comm", "/no/such"],
        )
    )
    values = list(reply.values.values)
    assert values[:3] == [b"5\n", b"6\n", b""]
    assert values[3:6] == [b"", b"", b""]
    assert values[6] == b"max\n"
    assert values[9:] == [b"husk-agent\n", b""] or values[9].startswith(b"husk-agent")
    assert reply.values.wall_ns > 0
    with pytest.raises(GuestError) as caught:
        await guest.call(
            write_cgroup=pb.WriteCgroup(
                container_id=id, files=[pb.CgroupFile(name="cgroup.max.depth", value="invalid")]
            )
        )
    assert (caught.value.step, caught.value.errno) == ("cgroup cgroup.max.depth", 22)


async def test_cgroup_of_all_containers_is_written_and_read(agent: Agent, guest: Guest) -> None:
    files = [pb.CgroupFile(name="cgroup.max.descendants", value="99")]
    await guest.call(write_cgroup=pb.WriteCgroup(container_id=".", files=files))
    read = pb.ReadCgroup(container_ids=["."], names=["cgroup.max.descendants", "../cgroup.procs"])
    assert list((await guest.call(read_cgroup=read)).values.values) == [b"99\n", b""]
    with pytest.raises(GuestError):
        await guest.call(write_cgroup=pb.WriteCgroup(container_id="", files=files))


async def count_processes(
    guest: Guest, ids: list[str], count: pb.ReadCgroup.Count.ValueType
) -> list[pb.ProcessCount]:
    reply = await guest.call(read_cgroup=pb.ReadCgroup(container_ids=ids, count=count))
    return list(reply.values.counts)


async def test_processes_and_open_files_are_counted(guest: Guest) -> None:
    script = "sleep 1000 & exec 5</etc/secret 6</etc/secret; exec sleep 1000"
    id = await guest.start(["sh", "-c", script])
    whole, of_all, gone = await eventually(
        lambda: count_processes(guest, [id, ".", "gone"], pb.ReadCgroup.FILES),
        until=lambda counts: (counts[0].processes, counts[0].files) == (2, 8),
    )
    # stdin, stdout and stderr of both, and two files of the first
    assert (whole.processes, whole.files, whole.sockets) == (2, 8, 0)
    assert of_all == gone == pb.ProcessCount()
    assert (await count_processes(guest, [id], pb.ReadCgroup.PROCESSES)) == [pb.ProcessCount(processes=2)]
    assert (await count_processes(guest, [id], pb.ReadCgroup.NOTHING)) == []


async def test_oom_score_of_running_processes_is_set(guest: Guest) -> None:
    id = await guest.start(["sh", "-c", "sleep 1000 & wait"])
    await guest.call(write_cgroup=pb.WriteCgroup(container_id=id, oom_score=pb.OomScore(adj=777)))
    assert (await guest.exec(id, ["cat", "/proc/1/oom_score_adj"]))[1] == "777\n"
    await guest.call(write_cgroup=pb.WriteCgroup(container_id=id))
    assert (await guest.exec(id, ["cat", "/proc/1/oom_score_adj"]))[1] == "777\n"


async def test_remove_of_200_processes_is_quick(guest: Guest) -> None:
    id = await guest.start(["sh", "-c", "i=0; while [ $i -lt 200 ]; do sleep 1000 & i=$((i+1)); done; wait"])
    await eventually(
        lambda: count_processes(guest, [id], pb.ReadCgroup.PROCESSES),
        until=lambda counts: counts[0].processes > 100,
    )
    await asyncio.wait_for(guest.remove(id), 10)


async def test_capabilities_up_to_the_kernels_last_one_are_set(guest: Guest) -> None:
    """The agent finds the kernel's last capability; it has no list."""
    status = status_of((await guest.run(["cat", "/proc/self/status"]))[1])
    assert int(status["CapEff"], 16) == ALL_CAPS & ~(1 << 24)
