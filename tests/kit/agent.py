"""The guest agent in standalone mode: an ordinary process in its own namespaces, without a VM.

Its containers are real, and run Debian's static busybox. Their cgroups are in a cgroup v2 mount of this
machine, beneath a directory that is removed with the agent.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.guest.execs import run_exec
from sandbox.guest.frames import MIN_VERSION, VERSION
from sandbox.host.mount_flags import MS_NODEV, MS_NOEXEC, MS_NOSUID
from tests.kit.eventually import eventually_sync

TREE = Path(__file__).parents[2]
VERSIONS = (MIN_VERSION, VERSION)
TOKEN = b"token of the vm."
ALL_CAPS = (1 << 41) - 1
APPLETS = """
sh true cat echo sleep ls stty tty env id head yes seq mount umask kill dd ln mkdir wc
stat grep setsid rmdir mkfifo umount chmod
"""


def build(target: str) -> Path:
    """Compile a program of the agent's Makefile: "husk-agent", "husk-agent-asan", "husk-agent-fuzz"."""
    out = TREE / "sandbox/agent/build"
    goal = target.removeprefix("husk-agent").lstrip("-") or "all"
    subprocess.run(
        ["nice", "make", "-s", "-C", str(TREE / "sandbox/agent"), f"OUT={out}", goal], check=True, timeout=300
    )
    return out / target


def find_cgroup2() -> Path:
    """Return the mount point of a cgroup v2 file system. Raises RuntimeError where there is none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path)
    raise RuntimeError("no cgroup v2 file system is mounted")


def make_rootfs(path: Path) -> Path:
    """Make a root file system of busybox at `path`."""
    (path / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", path / "bin/busybox")
    for applet in APPLETS.split():
        (path / "bin" / applet).symlink_to("busybox")
    for name in ("proc", "dev", "sys", "tmp", "etc"):
        (path / name).mkdir()
    (path / "etc/secret").write_text("of the image")
    return path


class Agent:
    """A running agent. `close` ends it and everything that it started."""

    def __init__(self, program: Path, directory: Path, *, unprivileged: bool = False) -> None:
        self.directory = directory
        self.socket = directory / "agent.sock"
        self.cgroup = find_cgroup2() / f"husk-agent-{secrets.token_hex(4)}"
        argv = [str(program), "--listen", f"unix:{self.socket}"]
        if not unprivileged:
            self.cgroup.mkdir()
            argv += ["--cgroup", str(self.cgroup), "--lenient-cgroup"]
        self.errors = (directory / "agent.err").open("wb")
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            user=65534 if unprivileged else None,
        )
        self._rootfs = 0
        eventually_sync(self.socket.exists, timeout_s=20, describe="the agent's socket exists")
        if not unprivileged:
            eventually_sync(self._is_moved, timeout_s=20, describe="the agent is in its namespaces")

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"

    def _children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def _is_moved(self) -> bool:
        return any(Path(f"/proc/{pid}/root/run/husk/files").exists() for pid in self._children())

    @property
    def pid(self) -> int:
        """The agent's pid on this machine; it is PID 1 of its namespace."""
        return self._children()[0]

    def rootfs(self) -> Path:
        """Make another root file system, which is removed with the test's directory."""
        self._rootfs += 1
        return make_rootfs(self.directory / f"rootfs{self._rootfs}")

    def stderr(self) -> str:
        """Return what it has written to stderr."""
        return (self.directory / "agent.err").read_text()

    def run_inside(self, *argv: str) -> str:
        """Run a command in the agent's namespaces; return its stdout."""
        command = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--ipc", "--mount", "--", *argv]
        return subprocess.run(command, check=True, timeout=30, capture_output=True, text=True).stdout

    def close(self) -> int:
        """End the agent; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.errors.close()
        for path in sorted(self.cgroup.rglob("*"), reverse=True) if self.cgroup.exists() else ():
            if path.is_dir():
                remove_cgroup(path)
        if self.cgroup.exists():
            remove_cgroup(self.cgroup)
        return status


def remove_cgroup(path: Path) -> None:
    """Remove a cgroup once it is empty: a killed process leaves it a moment later."""

    def removed() -> bool:
        try:
            path.rmdir()
        except OSError:
            return False
        return True

    eventually_sync(removed, timeout_s=20, describe=f"{path} is empty")


def standard_mounts() -> list[pb.Mount]:
    """Return /proc, /dev and /dev/pts."""
    inert = MS_NOSUID | MS_NODEV | MS_NOEXEC
    return [
        pb.Mount(source="proc", target="/proc", type="proc", flags=inert),
        pb.Mount(source="tmpfs", target="/dev", type="tmpfs", flags=MS_NOSUID, data="mode=0755"),
        pb.Mount(
            source="devpts",
            target="/dev/pts",
            type="devpts",
            flags=MS_NOSUID | MS_NOEXEC,
            data="newinstance,ptmxmode=0666,mode=0620",
            make=pb.Mount.DIRECTORY,
        ),
    ]


def standard_devices() -> list[pb.Device]:
    """Return /dev/null and such."""
    numbers = {"null": 3, "zero": 5, "full": 7, "urandom": 9}
    return [
        pb.Device(path=f"/dev/{name}", type=0o020000, major=1, minor=minor, mode=0o666)
        for name, minor in numbers.items()
    ]


def standard_links() -> list[pb.Link]:
    """Return /dev/fd, /dev/stdin and such."""
    targets = {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}
    return [pb.Link(path=f"/dev/{name}", target=f"/proc/self/fd{end}") for name, end in targets.items()]


def process(argv: Sequence[str], **more: Any) -> pb.Process:
    """Return a process of root with all capabilities; fields in `more` replace these."""
    fields: dict[str, Any] = {
        "env": [b"PATH=/bin", b"HOME=/"],
        "cwd": "/",
        "cap_bounding": ALL_CAPS & ~(1 << 24),
        "cap_permitted": ALL_CAPS & ~(1 << 24),  # this machine may lack CAP_SYS_RESOURCE
        "cap_effective": ALL_CAPS & ~(1 << 24),
        "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
    }
    return pb.Process(argv=argv, **(fields | more))


def start(id: str, rootfs: Path, argv: Sequence[str], **more: Any) -> pb.Start:
    """Return a Start with the standard mounts, devices and links; fields in `more` replace these."""
    fields: dict[str, Any] = {
        "process": process(argv),
        "mounts": standard_mounts(),
        "devices": standard_devices(),
        "links": standard_links(),
    }
    return pb.Start(id=id, rootfs=str(rootfs), **(fields | more))


class Sink:
    """Collects a stream; returns the credit at once unless `hold` is set."""

    def __init__(self, client: GuestClient, window: int = 1 << 16, *, hold: bool = False) -> None:
        self.client = client
        self.window = window
        self.hold = hold
        self.seen = bytearray()
        self.ended = asyncio.Event()
        self._changed = asyncio.Event()
        self.stream = client.open_input(self, window)

    def data(self, chunk: memoryview) -> None:
        """See `StreamSink`."""
        self.seen += chunk
        self._changed.set()
        if not self.hold:
            self.client.grant(self.stream, len(chunk))

    def closed(self) -> None:
        """See `StreamSink`."""
        self.ended.set()

    async def read(self, enough: Callable[[bytes], bool], timeout_s: float = 20) -> bytes:
        """Wait until `enough` holds for what was collected, and return it."""
        try:
            async with asyncio.timeout(timeout_s):
                while not enough(bytes(self.seen)):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not within {timeout_s:g} s; last seen: {self.seen[-200:]!r}") from None
        return bytes(self.seen)


class Guest:
    """A client of an agent, with shorthands. `connect` again replaces the connection before."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.epoch = 0
        self.events: list[pb.Event] = []
        self._event_came = asyncio.Event()
        self.client: GuestClient
        self._names: list[str] = []

    async def connect(self) -> pb.Welcome:
        """Connect with the next epoch."""
        self.epoch += 1
        self.client = await GuestClient.connect(
            self.agent.address, token=TOKEN, epoch=self.epoch, on_event=self._on_event, timeout_s=20
        )
        return self.client.welcome

    def _on_event(self, event: pb.Event) -> None:
        self.events.append(event)
        self._event_came.set()

    def name(self) -> str:
        """Return a new container id. Its container is removed by `close`."""
        name = f"c-{secrets.token_hex(4)}"
        self._names.append(name)
        return name

    async def call(self, **body: Any) -> pb.Reply:
        """Send the request with this body."""
        return await self.client.call(pb.Request(**body), 20)

    async def start(self, argv: Sequence[str], **more: Any) -> str:
        """Start a container, with fields of Start as keywords; return its id."""
        id = more.pop("id", None) or self.name()
        rootfs = more.pop("rootfs", None) or self.agent.rootfs()
        await self.call(start=start(id, rootfs, argv, **more))
        return id

    async def exited(self, id: str) -> pb.Exited:
        """Wait for a container's exit."""
        async with asyncio.timeout(20):
            while True:
                for event in self.events:
                    if event.exited.container_id == id and not event.exited.exec_id:
                        return event.exited
                self._event_came.clear()
                await self._event_came.wait()

    async def run(self, argv: Sequence[str], **more: Any) -> tuple[int, list[str]]:
        """Run a container to its end; return its exit code and the text of each line of its log."""
        sink = Sink(self.client)
        id = await self.start(argv, log_stream=sink.stream, log_window=sink.window, **more)
        exited = await self.exited(id)
        await asyncio.wait_for(sink.ended.wait(), 20)
        await self.remove(id)
        return exited.exit_code, [line.split(" ", 3)[3] for line in sink.seen.decode().splitlines()]

    async def sh(self, script: str, **more: Any) -> tuple[int, list[str]]:
        """Run a script, with stderr and stdout as one output."""
        return await self.run(["sh", "-c", f"exec 2>&1; {script}"], **more)

    async def exec(
        self, id: str, argv: Sequence[str], *, timeout_s: float = 20, limit: int = 1 << 20, **more: Any
    ) -> tuple[int, str, str]:
        """Run an exec to its end; return its exit code, stdout and stderr."""
        result = await run_exec(self.client, id, process(argv, **more), timeout_s, limit)
        return result.exit_code, result.stdout.decode(), result.stderr.decode()

    async def remove(self, id: str) -> None:
        """Remove a container."""
        await self.call(remove=pb.Remove(container_id=id))

    async def close(self) -> None:
        """Remove all containers that were started, and disconnect."""
        if self.client.lost:
            await self.connect()
        for name in self._names:
            await self.remove(name)
        await self.client.close()


class RawHost:
    """The host's end of the channel, for tests that send any bytes."""

    def __init__(self, path: Path, timeout_s: float = 20) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        # between bind(2) and listen(2) the path is there, and refuses
        connect = partial(self.socket.connect, str(path))
        eventually_sync(connect, until=lambda _: True, retry_on=(ConnectionRefusedError,))
        self.seen = b""

    def send(self, data: bytes) -> None:
        """Send any bytes."""
        self.socket.sendall(data)

    def greet(
        self, token: bytes = TOKEN, nonce: bytes | None = None, versions: tuple[int, int] = VERSIONS
    ) -> pb.Welcome:
        """Send a preamble and a Hello with this range of versions; return the Welcome."""
        nonce = nonce or os.urandom(16)
        hello = pb.Hello(min_version=versions[0], version=versions[1], epoch=7)
        self.send(token + nonce + frame(1, 0, hello.SerializeToString()))
        self.skip_to(nonce)
        kind, _, payload = self.frame()
        assert kind == 2
        return pb.Welcome.FromString(payload)

    def skip_to(self, nonce: bytes) -> None:
        """Drop everything up to the end of the nonce."""
        while nonce not in self.seen:
            self._receive()
        self.seen = self.seen.partition(nonce)[2]

    def frame(self) -> tuple[int, int, bytes]:
        """Return kind, stream and payload of the next frame."""
        while len(self.seen) < 12 or len(self.seen) < 12 + int.from_bytes(self.seen[:4], "little"):
            self._receive()
        length = int.from_bytes(self.seen[:4], "little")
        kind, stream = self.seen[4], int.from_bytes(self.seen[8:12], "little")
        payload, self.seen = self.seen[12 : 12 + length], self.seen[12 + length :]
        return kind, stream, payload

    def call(self, id: int, request: pb.Request) -> pb.Reply:
        """Send a request; return its reply, and drop other frames that come before it."""
        self.send(frame(3, id, request.SerializeToString()))
        while True:
            kind, stream, payload = self.frame()
            if kind == 4 and stream == id:
                return pb.Reply.FromString(payload)

    def is_silent(self, for_s: float = 0.2) -> bool:
        """Whether the agent sends nothing for this long, or closes the connection."""
        self.socket.settimeout(for_s)
        try:
            return not self.seen and self.socket.recv(1) == b""
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(20)

    def _receive(self) -> None:
        data = self.socket.recv(1 << 16)
        assert data, "the agent hung up"
        self.seen += data

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def frame(kind: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame, valid or not."""
    return (
        len(payload).to_bytes(4, "little") + bytes([kind, 0, 0, 0]) + stream.to_bytes(4, "little") + payload
    )
