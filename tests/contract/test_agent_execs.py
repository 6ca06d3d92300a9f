"""Execs in the agent's containers: streams with credit, terminals, exits and timeouts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import DeadlineExceeded, GuestError, StreamReset
from sandbox.guest import guest_pb2 as pb
from tests.kit.agent import Agent, Guest, Sink, process
from tests.kit.eventually import eventually


@pytest.fixture
async def box(guest: Guest) -> str:
    """The id of a container to run execs in."""
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


async def test_exec_returns_outputs_and_exit_code(guest: Guest, box: str) -> None:
    assert await guest.exec(box, ["sh", "-c", "echo out; echo err >&2; exit 3"]) == (3, "out\n", "err\n")
    assert (await guest.exec(box, ["sh", "-c", "kill -9 $$"]))[0] == 137


async def test_exec_with_reply_on_exit_replies_with_its_exit(guest: Guest, box: str) -> None:
    """For a caller that waits for both. Output comes when it is printed."""
    running = Running(guest, box, ["sh", "-c", "echo on; sleep 0.2; exit 4"], reply_on_exit=True)
    await running.stdout.read(lambda seen: seen == b"on\n")
    assert not running.started.done() and not running.stdout.ended.is_set()
    assert (await running.exited).exit_code == 4
    assert running.started.done() and running.stdout.ended.is_set() and running.stderr.ended.is_set()
    with pytest.raises(GuestError, match="no-such"):
        await Running(guest, box, ["no-such"], reply_on_exit=True).started
    running = Running(guest, box, ["sh", "-c", "head -c 3000000 /dev/zero; exit 5"], reply_on_exit=True)
    assert (await running.exited).exit_code == 5
    assert len(running.stdout.seen) == 3_000_000


async def test_exec_runs_inside_the_container(guest: Guest, box: str) -> None:
    script = "cat /etc/secret; cat /proc/1/cmdline; cat /proc/self/cgroup"
    _, out, _ = await guest.exec(box, ["sh", "-c", script])
    assert out.startswith("of the imagesleep\0" + "10000\0")
    assert "0::/husk-exec." in out, "the container's cgroup is the root of its cgroup namespace"


@pytest.mark.parametrize(
    ("more", "step", "errno"),
    [
        ({"argv": ["no-such"]}, "exec", 2),
        ({"cwd": "/no/such"}, "chdir", 2),
        ({"seccomp": b"12345678"}, "seccomp", 22),
    ],
)
async def test_exec_that_failed_names_the_step(
    agent: Agent, guest: Guest, box: str, more: dict[str, Any], step: str, errno: int
) -> None:
    fields = {"argv": ["true"]} | more
    with pytest.raises(GuestError) as caught:
        await guest.exec(box, fields.pop("argv"), **fields)
    assert (caught.value.step, caught.value.errno) == (step, errno)
    assert len(list((agent.cgroup / "husk" / box).glob("husk-exec.*"))) <= 1, (
        "one cgroup is kept for the next exec"
    )


async def test_exec_after_container_exit_fails(guest: Guest) -> None:
    gone = await guest.start(["true"])
    await guest.exited(gone)
    for id in (gone, "unknown"):
        with pytest.raises(GuestError) as caught:
            await guest.exec(id, ["true"])
        assert (caught.value.step, caught.value.errno) == ("container", 3)


async def test_exec_gets_its_ids(guest: Guest, box: str) -> None:
    _, out, _ = await guest.exec(box, ["id"], uid=5, gid=6, groups=[7])
    assert out == "uid=5 gid=6 groups=7\n"


async def test_stdin_is_passed_until_it_ends(shell: Running) -> None:
    await shell.stdin.write(b"echo one\n")
    assert await shell.stdout.read(lambda seen: b"\n" in seen) == b"one\n"
    await shell.stdin.write(b"echo now; cat; exit 4\n")
    await shell.stdout.read(lambda seen: b"now\n" in seen)  # or the shell might read for cat
    await shell.stdin.write(b"two\n")
    assert await shell.stdout.read(lambda seen: b"two\n" in seen) == b"one\nnow\ntwo\n"
    shell.stdin.close()
    assert (await shell.exited).exit_code == 4


async def test_stdin_of_two_megabytes_through_a_slow_process_is_passed(guest: Guest, box: str) -> None:
    """Far more than any credit, and the process reads only after 0.1 s."""
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


async def test_stdin_without_a_reader_is_reset(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["sh", "-c", "exec <&-; echo closed; exec sleep 100"])
    await running.started
    await running.stdout.read(lambda seen: seen == b"closed\n")
    with pytest.raises(StreamReset):
        for _ in range(100):
            await running.stdin.write(bytes(10000))
            await asyncio.sleep(0.005)


async def test_exec_without_stdin_reads_end_of_file(guest: Guest, box: str) -> None:
    assert await guest.exec(box, ["cat"]) == (0, "", "")


async def test_exec_with_a_terminal_has_its_size_and_echo(guest: Guest, box: str) -> None:
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


async def test_interrupt_character_ends_an_exec_with_a_terminal(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["cat"], tty=True)
    await running.started
    await running.stdin.write(b"x\n\x03")
    assert (await running.exited).exit_code == 130


async def test_exec_with_a_pipe_in_place_of_ptmx_fails(guest: Guest) -> None:
    """A container may put a named pipe in place of its devpts: opening it must not block."""
    script = "umount /dev/pts; rmdir /dev/pts; mkdir /dev/pts; mkfifo /dev/pts/ptmx; echo done; sleep 1000"
    sink = Sink(guest.client)
    box = await guest.start(["sh", "-c", script], log_stream=sink.stream, log_window=sink.window)
    await sink.read(lambda seen: b"done" in seen)
    with pytest.raises(GuestError) as caught:
        await guest.exec(box, ["true"], tty=True, timeout_s=5)
    assert caught.value.step == "open /dev/pts/ptmx"


async def test_output_beyond_the_credit_waits(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["seq", "1", "100000"], window=1000, hold=True)
    await running.stdout.read(lambda seen: len(seen) == 1000)
    assert (await guest.exec(box, ["echo", "quick"], timeout_s=5))[1] == "quick\n"
    assert len(running.stdout.seen) == 1000
    assert not running.exited.done()
    guest.client.reset_input(running.stdout.stream)
    assert (await asyncio.wait_for(running.exited, 10)).exit_code == 141, "a reset gives the writer EPIPE"


async def test_exit_is_reported_without_credit(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["sh", "-c", "exit 6"], window=0)
    assert (await asyncio.wait_for(running.exited, 10)).exit_code == 6


async def test_exit_comes_after_all_output(guest: Guest, box: str) -> None:
    for _ in range(20):
        running = Running(guest, box, ["seq", "1", "3000"])
        assert (await running.exited).exit_code == 0
        assert running.stdout.ended.is_set()
        assert running.stdout.seen.endswith(b"\n3000\n")


async def test_background_children_of_an_exec_live_on(agent: Agent, guest: Guest, box: str) -> None:
    script = "sleep 5555 & echo started"
    assert await guest.exec(box, ["sh", "-c", script], timeout_s=5) == (0, "started\n", "")
    await eventually(  # a process in the middle of its execve shows no command line
        lambda: guest.exec(box, ["sh", "-c", "cat /proc/[0-9]*/cmdline"]),
        until=lambda result: "5555" in result[1],
    )
    cgroups = agent.cgroup / "husk" / box
    kept = sorted(path.name for path in cgroups.glob("husk-exec.*"))
    assert kept == ["husk-exec.0", "husk-exec.1"], "that of the background process, and one for the next exec"
    await guest.exec(box, ["sh", "-c", "kill -9 $(ls /proc | grep -x '[0-9]*' | grep -vx -e 1 -e $$)"])

    async def left() -> int:
        await guest.exec(box, ["true"])  # at its end the agent removes the cgroups that are empty by then
        return len(list(cgroups.glob("husk-exec.*")))

    await eventually(left, until=lambda count: count == 1)


async def test_exec_timeout_kills_the_whole_tree(guest: Guest, box: str) -> None:
    """CRI, ExecSync. Also processes that left the session and ignore signals."""
    script = "trap '' TERM HUP; (setsid sleep 8888 &); sleep 9999 & wait"
    with pytest.raises(DeadlineExceeded):
        await guest.exec(box, ["sh", "-c", script], timeout_s=0.3)
    _, out, _ = await guest.exec(box, ["sh", "-c", "cat /proc/[0-9]*/cmdline"])
    assert "8888" not in out
    assert "9999" not in out


async def test_signal_reaches_an_exec(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["sleep", "100"])
    await running.started
    await guest.call(signal=pb.Signal(container_id=box, exec_id=running.id, signal=15))
    assert (await running.exited).exit_code == 143
    with pytest.raises(GuestError) as caught:
        await guest.call(signal=pb.Signal(container_id=box, exec_id=running.id, signal=15))
    assert caught.value.errno == 3


async def test_exec_ends_with_its_container(guest: Guest, box: str) -> None:
    running = Running(guest, box, ["sleep", "100"])
    await running.started
    await guest.remove(box)
    assert (await asyncio.wait_for(running.exited, 10)).exit_code == 137


async def test_exec_ends_with_its_connection(guest: Guest, box: str) -> None:
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

    await eventually(lambda: not alive(), describe="the execs of the old connection have ended")
    assert (await guest.exec(box, ["echo", "again"])) == (0, "again\n", "")
    assert not any(event.exited.exec_id for event in guest.events)


async def test_40_execs_at_once_succeed(guest: Guest, box: str) -> None:
    results = await asyncio.gather(*(guest.exec(box, ["echo", str(number)]) for number in range(40)))
    assert [out for _, out, _ in results] == [f"{number}\n" for number in range(40)]


async def test_process_inherits_no_descriptor_of_the_agent(guest: Guest, box: str) -> None:
    listing = ["ls", "-l", "/proc/self/fd"]
    _, out, _ = await guest.exec(box, listing)
    kept = [line.split()[-3] for line in out.splitlines() if "->" in line]
    assert kept[:3] == ["0", "1", "2"]
    assert len(kept) == 3
    code, lines = await guest.run(listing)
    assert code == 0
    assert len([line for line in lines if "->" in line]) == 3
