"""Processes are started in their place, recognized again, watched and killed."""

# ruff: noqa: ASYNC220, ASYNC221 -- a test has its loop to itself

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sandbox.errors import DeadlineExceeded
from sandbox.host import process
from sandbox.host.process import Credentials, ProcessIdentity
from tests.kit.eventually import eventually

PAUSE = "kill -STOP $$"  # a shell that keeps its arguments, without a child that would outlive it


async def sleeper(*extra: str, **options: object) -> ProcessIdentity:
    return await process.start(["sleep", "60", *extra], **options)  # type: ignore[arg-type]


async def executed(identity: ProcessIdentity, program: str = "sleep") -> None:
    """Wait until the child has executed the program itself."""
    comm = Path(f"/proc/{identity.pid}/comm")
    await eventually(lambda: comm.read_text().strip() == program, describe=f"exec of {program}")


def facts(identity: ProcessIdentity) -> dict[str, str]:
    lines = Path(f"/proc/{identity.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_child_is_detached_and_unprivileged() -> None:
    identity = await sleeper(user=Credentials(uid=60606, gid=60606, groups=(60607,)), umask=0o027)
    try:
        await executed(identity)
        seen = facts(identity)
        assert seen["Uid"].split() == ["60606"] * 4
        assert seen["Gid"].split() == ["60606"] * 4
        assert seen["Groups"] == "60607"
        assert (seen["CapEff"], seen["CapBnd"]) == ("0" * 16, "0" * 16)
        assert seen["NoNewPrivs"] == "1"
        assert seen["Umask"] == "0027"
        assert os.getsid(identity.pid) == identity.pid != os.getsid(0)
        assert Path(f"/proc/{identity.pid}/cwd").readlink() == Path("/")
    finally:
        await process.kill(identity)


async def test_only_given_descriptors_are_inherited(tmp_path: Path) -> None:
    with (tmp_path / "given").open("wb") as given, (tmp_path / "kept").open("wb") as kept:
        os.set_inheritable(kept.fileno(), False)
        identity = await sleeper(pass_fds=(given.fileno(),))
        try:
            await executed(identity)
            descriptors, expected = Path(f"/proc/{identity.pid}/fd"), {"0", "1", "2", str(given.fileno())}
            # its dynamic loader may still have libraries open
            await eventually(lambda: {entry.name for entry in descriptors.iterdir()} == expected)
        finally:
            await process.kill(identity)


async def test_child_runs_in_the_given_network_namespace(tmp_path: Path) -> None:
    with subprocess.Popen(["unshare", "--net", "sleep", "60"]) as holder:
        try:
            path = Path(f"/proc/{holder.pid}/ns/net")
            own = Path("/proc/self/ns/net").readlink()
            await eventually(lambda: path.readlink() != own, describe="unshare")
            identity = await sleeper(netns=str(path))
            assert Path(f"/proc/{identity.pid}/ns/net").readlink() == path.readlink()
            await process.kill(identity)
        finally:
            holder.kill()
    with pytest.raises(FileNotFoundError):
        await sleeper(netns=str(tmp_path / "absent"))


async def test_bind_is_visible_to_the_child_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("inside")
    target.write_text("outside")
    argv = ["sh", "-c", 'cat "$0" >&1', str(target)]
    with (tmp_path / "out").open("wb") as out:
        identity = await process.start(argv, stdout=out.fileno(), binds={str(target): str(source)})
        assert await process.wait_exit(identity) == 0
    assert (tmp_path / "out").read_text() == "inside"
    assert target.read_text() == "outside"


async def test_failing_preparation_ends_the_child_with_126_and_a_reason(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with (tmp_path / "log").open("wb") as log:
        identity = await sleeper(cgroups=[str(absent)], stderr=log.fileno())
        assert await process.wait_exit(identity) == 126
    assert f"{absent}/cgroup.procs" in (tmp_path / "log").read_text()


async def test_wait_exit_returns_status_or_signal() -> None:
    assert await process.wait_exit(await process.start(["sh", "-c", "exit 7"])) == 7
    identity = await sleeper()
    waiting = asyncio.create_task(process.wait_exit(identity))
    await asyncio.sleep(0)
    await executed(identity)
    os.kill(identity.pid, signal.SIGTERM)
    assert await waiting == -signal.SIGTERM
    assert not process.alive(identity)
    assert await process.wait_exit(identity) is None  # long gone


async def test_other_boot_or_start_time_is_another_process() -> None:
    identity = await sleeper()
    try:
        assert process.alive(identity)
        for other in (
            msgspec.structs.replace(identity, start_time=identity.start_time + 1),
            msgspec.structs.replace(identity, boot_id="other"),
        ):
            assert not process.alive(other)
            await process.kill(other)
            assert await process.wait_exit(other) is None
        assert process.alive(identity)
    finally:
        await process.kill(identity)


async def test_kill_is_idempotent_and_leaves_no_zombie() -> None:
    identity = await sleeper()
    await process.kill(identity)
    await process.kill(identity)
    assert not Path(f"/proc/{identity.pid}").exists()


@pytest.mark.parametrize("code", [errno.ESRCH, errno.EINVAL])
async def test_process_that_is_released_meanwhile_counts_as_gone(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Its pid is still allocated for a moment, for which some kernels return EINVAL."""
    identity = await sleeper()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", _failing(code))
        await process.kill(identity)
        assert await process.wait_exit(identity) is None
        patch.setattr(os, "pidfd_open", _failing(errno.EMFILE))
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            await process.kill(identity)
    assert process.alive(identity)
    await process.kill(identity)


def _failing(code: int) -> Callable[[int], int]:
    def fail(pid: int) -> int:
        raise OSError(code, os.strerror(code))

    return fail


async def test_wait_exit_of_an_adopted_process_returns_none() -> None:
    """Not our child: started by a process that has exited, as after a crash of the daemon."""
    script = "import asyncio; from sandbox.host import process;"
    script += "i = asyncio.run(process.start(['sleep', '60'])); print(i.pid, i.start_time, i.boot_id)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    pid, start_time, boot = done.stdout.split()
    identity = ProcessIdentity(pid=int(pid), start_time=int(start_time), boot_id=boot)
    assert process.alive(identity)
    waiting = asyncio.create_task(process.wait_exit(identity))
    await asyncio.sleep(0)
    await process.kill(identity)
    assert await waiting is None
    assert not process.alive(identity)


async def test_find_by_argument_finds_only_what_start_made() -> None:
    needle = f"husk-test-{os.getpid()}-{time.monotonic_ns()}"
    with subprocess.Popen(["sh", "-c", PAUSE, needle], start_new_session=True) as other:
        try:
            identity = await process.start(["sh", "-c", PAUSE, needle])
            found = process.find_by_argument(needle)
            assert identity in found
            assert other.pid not in {each.pid for each in found}
            await process.kill(identity)
            assert identity not in process.find_by_argument(needle)
        finally:
            os.killpg(other.pid, signal.SIGKILL)


async def test_process_is_found_at_any_moment_of_its_start() -> None:
    """Its start has three execs, and during each of them it shows no arguments."""
    for number in range(30):
        needle = f"husk-test-{os.getpid()}-{time.monotonic_ns()}"
        identity = await process.start(["sh", "-c", PAUSE, needle])
        if number % 2:
            await asyncio.sleep(number / 10_000)
        try:
            assert identity in process.find_by_argument(needle)
        finally:
            await process.kill(identity)


async def test_cancelled_start_leaves_no_process() -> None:
    needle = f"husk-test-{os.getpid()}-{time.monotonic_ns()}"
    starting = asyncio.create_task(process.start(["sh", "-c", PAUSE, needle]))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert process.find_by_argument(needle) == []


async def test_run_collects_status_and_bounded_output(tmp_path: Path) -> None:
    done = await process.run(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=10)
    assert (done.status, done.stdout, done.stderr, done.truncated) == (3, b"out\n", b"err\n", False)
    done = await process.run(["head", "-c", "100000", "/dev/zero"], timeout_s=10, max_output=1000)
    assert (done.status, len(done.stdout), done.truncated) == (0, 1000, True)
    done = await process.run(["id", "-u"], timeout_s=10, user=Credentials(uid=60606, gid=60606))
    assert done.stdout == b"60606\n"
    with pytest.raises(FileNotFoundError):
        await process.run([str(tmp_path / "absent")], timeout_s=1)


@pytest.mark.parametrize("script", ["sleep 60", "exec >&- 2>&-; sleep 60"])
async def test_run_kills_the_program_after_its_timeout(script: str) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await process.run(["sh", "-c", script], timeout_s=0.3)
    assert time.monotonic() - began < 3
