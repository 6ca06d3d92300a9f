"""Execs in the agent's containers: streams with credit, terminals, ends and timeouts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import DeadlineExceeded, GuestError, StreamReset
from sandbox.guest import guest_pb2 as pb
from tests.kit.agent import Agent, Guest, Sink, process, wait_for


@pytest.fixture
async def box(guest: Guest) -> str:
    """A container to run things in."""
    return await guest.start(["sleep", "10000"])


class Running:
    """An exec with its streams open."""

    def __init__(
        self, guest: Guest, box: str, argv: list[str], *, window: int = 1 << 16, **more: Any
    ) -> None:
        hold = bool(more.pop("hold", False))
        self.guest = guest
        reply_on_exit = bool(more.pop("reply_on_exit", False))
        self.stdin = guest.client.open_output()  # not used with `reply_on_exit`
        self.stdout = Sink(guest.client, window, hold=hold)
        tty = bool(more.get("tty"))
        self.stderr = self.stdout if tty else Sink(guest.client, window, hold=hold)
        self.id = guest.client.next_exec_id()
        self.exited = guest.client.expect_exit(self.id)
        self.started = guest.client.post(
            pb.Request(
                exec=pb.Exec(
                    container_id=box,
                    exec_id=self.id,
                    process=process(argv, **more),
                    stdin_stream=0 if reply_on_exit else self.stdin.id,
                    stdout_stream=self.stdout.stream,
                    stderr_stream=0 if tty else self.stderr.stream,
                    window=window,
                    reply_on_exit=reply_on_exit,
                )
            )
        )


@pytest.fixture
async def shell(guest: Guest, box: str) -> AsyncIterator[Running]:
    running = Running(guest, box, ["sh"])
    await running.started
    yield running


async def test_output_and_exit_code(guest: Guest, box: str) -> None:
    assert await guest.exec(box, ["sh", "-c", "echo out; echo err >&2; exit 3"]) == (3, "out\n", "err\n")
    assert (await guest.exec(box, ["sh", "-c", "kill -9 $$"]))[0] == 137


async def test_start_and_exit_are_told_together(guest: Guest, box: str) -> None:
    """For whoever waits for both; what it prints comes when it is printed."""
    running = Running(guest, box, ["sh", "-c", "echo on; sleep 0.3; exit 4"], reply_on_exit=True)
    await running.stdout.read(lambda seen: seen == b"on\n")
    assert not running.started.done() and not running.stdout.ended.is_set()
    assert (await running.exited).exit_code == 4
    assert running.started.done() and running.stdout.ended.is_set() and running.stderr.ended.is_set()
    with pytest.raises(GuestError, match="no-such"):
        await Running(guest, box, ["no-such"], reply_on_exit=True).started
    running = Running(guest, box, ["sh", "-c", "head -c 3000000 /dev/zero; exit 5"], reply_on_exit=True)
    assert (await running.exited).exit_code == 5
    assert len(running.stdout.seen) == 3_000_000


async def test_it_is_inside(guest: Guest, box: str) -> None:
    script = "cat /etc/secret; cat /proc/1/cmdline; cat /proc/self/cgroup"
    _, out, _ = await guest.exec(box, ["sh", "-c", script])
    assert out.startswith("of the imagesleep\0" + "10000\0")
    assert "0::/husk-exec." in out, "the container's cgroup is the root of what it sees"


@pytest.mark.parametrize(
    ("more", "step", "errno"),
    [
        ({"argv": ["no-such"]}, "exec", 2),
        ({"cwd": "/no/such"}, "chdir", 2),
        ({"seccomp": b"12345678"}, "seccomp", 22),
    ],
)
async def test_failures(
    agent: Agent, guest: Guest, box: str, more: dict[str, Any], step: str, errno: int
) -> None:
    fields = {"argv": ["true"]} | more
    with pytest.raises(GuestError) as caught:
        await guest.exec(box, fields.pop("argv"), **fields)
    assert (caught.value.step, caught.value.errno) == (step, errno)
    assert len(list((agent.cgroup / "husk" / box).glob("husk-exec.*"))) <= 1, "one is kept for the next"


async def test_where_there_is_no_container(guest: Guest) -> None:
    gone = await guest.start(["true"])
    await guest.exited(gone)
    for id in (gone, "nobody"):
        with pytest.raises(GuestError) as caught:
            await guest.exec(id, ["true"])
        assert (caught.value.step, caught.value.errno) == ("container", 3)


async def test_identity(guest: Guest, box: str) -> None:
    _, out, _ = await guest.exec(box, ["id"], uid=5, gid=6, groups=[7])
    assert out == "uid=5 gid=6 groups=7\n"


async def test_stdin(shell: Running) -> None:
    await shell.stdin.write(b"echo one\n")
    assert await shell.stdout.read(lambda seen: b"\n" in seen) == b"one\n"
    await shell.stdin.write(b"echo now; cat; exit 4\n")
    await shell.stdout.read(lambda seen: b"now\n" in seen)  # or the shell might read for cat
    await shell.stdin.write(b"two\n")
    assert await shell.stdout.read(lambda seen: b"two\n" in seen) == b"one\nnow\ntwo\n"
    shell.stdin.close()
    assert (await shell.exited).exit_code == 4


async def test_much_stdin(guest: Guest, box: str) -> None:
    """Far more than any credit, through a process that takes its time."""
    running = Running(guest, box, ["sh", "-c", "sleep 0.1; exec cat"])
    await running.started
    data = bytes(range(256)) * 8000

    async def feed() -> None:
        await running.stdin.write(data)
        running.stdin.close()

    feeding = asyncio.ensure_future(feed())
    assert await running.stdout.read(lambda seen: len(seen) >= len(data)) == data
    await feeding
    assert (await running.exited).exit_code == 0


async def test_stdin_that_nobody_reads(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["sh", "-c", "exec <&-; echo closed; exec sleep 100"])
    await running.started
    await running.stdout.read(lambda seen: seen == b"closed\n")
    with pytest.raises(StreamReset):
        for _ in range(100):
            await running.stdin.write(bytes(10000))
            await asyncio.sleep(0.005)


async def test_without_stdin_it_is_empty(guest: Guest, box: str) -> None:
    assert await guest.exec(box, ["cat"]) == (0, "", "")


async def test_terminal(guest: Guest, box: str) -> None:
    running = Running(
        guest, box, ["sh", "-c", "tty; stty size; read x; echo got $x"], tty=True, rows=9, columns=33
    )
    await running.started
    await running.stdout.read(lambda seen: b"9 33\r\n" in seen)
    await running.stdin.write(b"word\n")
    seen = await running.stdout.read(lambda seen: b"got" in seen)
    assert seen.startswith(b"/dev/pts/")
    assert seen.endswith(b"word\r\ngot word\r\n")
    assert (await running.exited).exit_code == 0
    await asyncio.wait_for(running.stdout.ended.wait(), 10)


async def test_hanging_up_by_the_terminal(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["cat"], tty=True)
    await running.started
    await running.stdin.write(b"x\n\x03")
    assert (await running.exited).exit_code == 130


async def test_a_terminal_that_is_none(guest: Guest) -> None:
    """A container may put a pipe where its devpts was: nobody waits for it."""
    script = "umount /dev/pts; rmdir /dev/pts; mkdir /dev/pts; mkfifo /dev/pts/ptmx; echo done; sleep 1000"
    sink = Sink(guest.client)
    box = await guest.start(["sh", "-c", script], log_stream=sink.stream, log_window=sink.window)
    await sink.read(lambda seen: b"done" in seen)
    with pytest.raises(GuestError) as caught:
        await guest.exec(box, ["true"], tty=True, timeout_s=5)
    assert caught.value.step == "open /dev/pts/ptmx"


async def test_credit_is_kept(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["seq", "1", "100000"], window=1000, hold=True)
    await running.stdout.read(lambda seen: len(seen) == 1000)
    assert (await guest.exec(box, ["echo", "quick"], timeout_s=5))[1] == "quick\n"
    assert len(running.stdout.seen) == 1000
    assert not running.exited.done()
    guest.client.reset_input(running.stdout.stream)
    assert (await asyncio.wait_for(running.exited, 10)).exit_code == 141, "a reset is a broken pipe"


async def test_exit_without_credit(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["sh", "-c", "exit 6"], window=0)
    assert (await asyncio.wait_for(running.exited, 10)).exit_code == 6


async def test_exit_after_all_output(guest: Guest, box: str) -> None:
    for _ in range(20):
        running = Running(guest, box, ["seq", "1", "3000"])
        assert (await running.exited).exit_code == 0
        assert running.stdout.ended.is_set()
        assert running.stdout.seen.endswith(b"\n3000\n")


async def test_background_children_live_on(agent: Agent, guest: Guest, box: str) -> None:
    script = "sleep 5555 & echo started"
    assert await guest.exec(box, ["sh", "-c", script], timeout_s=5) == (0, "started\n", "")
    async with asyncio.timeout(20):  # a process in the middle of its execve shows no command line
        while "5555" not in (await guest.exec(box, ["sh", "-c", "cat /proc/[0-9]*/cmdline"]))[1]:
            pass
    cgroups = agent.cgroup / "husk" / box
    kept = sorted(path.name for path in cgroups.glob("husk-exec.*"))
    assert kept == ["husk-exec.0", "husk-exec.1"], "its own, and one for the next exec"
    await guest.exec(box, ["sh", "-c", "kill -9 $(ls /proc | grep -x '[0-9]*' | grep -vx -e 1 -e $$)"])
    async with asyncio.timeout(20):  # each exec that ends sweeps what has become empty by then
        while len(list(cgroups.glob("husk-exec.*"))) > 1:
            await guest.exec(box, ["true"])


async def test_timeout_kills_the_tree(guest: Guest, box: str) -> None:
    """CRI, ExecSync: also what has left the session and ignores signals."""
    script = "trap '' TERM HUP; (setsid sleep 8888 &); sleep 9999 & wait"
    with pytest.raises(DeadlineExceeded):
        await guest.exec(box, ["sh", "-c", script], timeout_s=0.3)
    _, out, _ = await guest.exec(box, ["sh", "-c", "cat /proc/[0-9]*/cmdline"])
    assert "8888" not in out
    assert "9999" not in out


async def test_signals(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["sleep", "100"])
    await running.started
    await guest.call(signal=pb.Signal(container_id=box, exec_id=running.id, signal=15))
    assert (await running.exited).exit_code == 143
    with pytest.raises(GuestError) as caught:
        await guest.call(signal=pb.Signal(container_id=box, exec_id=running.id, signal=15))
    assert caught.value.errno == 3


async def test_execs_end_with_their_container(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["sleep", "100"])
    await running.started
    await guest.remove(box)
    assert (await asyncio.wait_for(running.exited, 10)).exit_code == 137


async def test_execs_end_with_their_connection(guest: Guest, box: str) -> None:
    marks = Path("/proc")
    running = Running(guest, box, ["sh", "-c", "sleep 6789 & sleep 6789"])
    await running.started
    await guest.connect()

    def alive() -> bool:
        for each in marks.glob("[0-9]*/cmdline"):
            try:
                if each.read_bytes() == b"sleep\0" + b"6789\0":
                    return True
            except OSError:
                continue
        return False

    wait_for(lambda: not alive(), "the execs of the old connection to be dead")
    assert (await guest.exec(box, ["echo", "again"])) == (0, "again\n", "")
    assert not any(event.exited.exec_id for event in guest.events)


async def test_many_at_once(guest: Guest, box: str) -> None:
    results = await asyncio.gather(*(guest.exec(box, ["echo", str(number)]) for number in range(40)))
    assert [out for _, out, _ in results] == [f"{number}\n" for number in range(40)]


async def test_no_descriptor_of_the_agent_is_left_open(guest: Guest, box: str) -> None:
    listing = ["ls", "-l", "/proc/self/fd"]
    _, out, _ = await guest.exec(box, listing)
    kept = [line.split()[-3] for line in out.splitlines() if "->" in line]
    assert kept[:3] == ["0", "1", "2"]
    assert len(kept) == 3
    code, lines = await guest.run(listing)
    assert code == 0
    assert len([line for line in lines if "->" in line]) == 3
