"""A fake agent: speaks the real protocol, runs nothing, and misbehaves on demand.

It keeps what a guest keeps across connections (token, containers, unacknowledged log bytes), so recovery can
be tested against it; `listen` serves a unix socket as a VMM's chardev does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from sandbox.guest import guest_pb2 as pb
from sandbox.guest.frames import (
    MAX_DATA,
    MIN_VERSION,
    VERSION,
    Frame,
    FrameParser,
    Kind,
    decode_credit,
    encode,
    encode_credit,
)


@dataclass
class FakeProgram:
    """What an exec of this program does."""

    stdout: bytes = b""
    stderr: bytes = b""
    exit_code: int = 0
    until_killed: bool = False
    keeps_outputs_open: bool = False  # as if a background child held them
    reads_stdin: bool = False  # echoes stdin to stdout, and ends with it


@dataclass
class FakeContainer:
    """A container, and its log that was not acknowledged."""

    log: bytearray = field(default_factory=bytearray)  # from `log_start` on
    log_start: int = 0  # acknowledged up to here
    exited: pb.Exited | None = None
    stream: int = 0

    @property
    def log_end(self) -> int:
        return self.log_start + len(self.log)


@dataclass
class _Output:
    """A guest-to-host stream."""

    credit: int
    pending: bytearray = field(default_factory=bytearray)  # of an exec
    log: FakeContainer | None = None
    sent: int = 0  # offset in the log
    ending: bool = False


@dataclass
class _Exec:
    request: pb.Exec
    program: FakeProgram


class FakeAgent:
    """One guest's agent. Its attributes choose what goes wrong."""

    def __init__(self) -> None:
        self.token: bytes | None = None
        self.containers: dict[str, FakeContainer] = {}
        self.programs: dict[str, FakeProgram] = {}
        self.disks: list[str] = []  # serial numbers of those that were found
        self.requests: list[pb.Request] = []
        self.hellos: list[pb.Hello] = []
        self.resets: list[int] = []
        self.signals: list[pb.Signal] = []
        self.stdin = bytearray()
        # ---- faults
        self.versions = (MIN_VERSION, VERSION)  # that it speaks, lowest and highest
        self.welcome = b""  # bytes sent in place of the real Welcome
        self.now_ns = 0  # its monotonic clock in the Welcome; 0: not set
        self.wrong_epoch = False
        self.silent = False  # reads, but does not answer the preamble
        self.stale = b""  # sent before the nonce, as if queued for an old connection
        self.answer: Callable[[pb.Request], pb.Reply | bool | None] = lambda request: True
        self.piece = MAX_DATA  # log bytes in one DATA frame
        self.stdin_window = 65536
        self.connected = asyncio.Event()
        self.on_acknowledged: Callable[[int], None] = lambda log_start: None  # of any container's log
        self._seen = b""
        self._parser = FrameParser()
        self._writer: asyncio.StreamWriter | None = None
        self._outputs: dict[int, _Output] = {}
        self._execs: dict[str, _Exec] = {}
        self._greeted = False

    @asynccontextmanager
    async def listen(self, path: Path) -> AsyncIterator[FakeAgent]:
        """Serve connections on a unix socket."""
        server = await asyncio.start_unix_server(self.serve, str(path))
        try:
            yield self
        finally:
            server.close()
            self.drop()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        self._writer = writer
        try:
            while data := await reader.read(1 << 18):
                self._take(data)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the end, of the connection or of the test
        finally:
            writer.close()

    # ------------------------------------------------------------------------------ faults

    @property
    def linked(self) -> bool:
        """Whether a host has connected."""
        return self._writer is not None

    def drop(self) -> None:
        """Cut the connection."""
        if self._writer is not None:
            self._writer.transport.abort()

    def send_raw(self, data: bytes) -> None:
        """Send any bytes; without effect on a closed connection."""
        assert self._writer is not None
        if not self._writer.is_closing():
            self._writer.write(data)

    def send(self, kind: Kind, stream: int = 0, payload: bytes = b"") -> None:
        """Send a frame."""
        self.send_raw(encode(kind, stream, payload))

    def stop_reading(self) -> None:
        """Leave everything unread from now on."""
        assert self._writer is not None
        cast(asyncio.Transport, self._writer.transport).pause_reading()

    # ------------------------------------------------------------------ events in the guest

    def print_log(self, id: str, data: bytes) -> None:
        """Append to a container's log; the container is made if it does not exist."""
        container = self.containers.setdefault(id, FakeContainer())
        container.log += data
        self._pump_log(container)

    def exit(self, id: str, code: int = 0, at_ns: int = 1) -> None:
        """End a container; it is made if it does not exist."""
        container = self.containers.setdefault(id, FakeContainer())
        container.exited = pb.Exited(container_id=id, exit_code=code, at_ns=at_ns)
        self._pump_log(container)
        if self._greeted:
            self.send(Kind.EVENT, 0, pb.Event(exited=container.exited).SerializeToString())

    # ------------------------------------------------------------------------------ incoming

    def _take(self, data: bytes) -> None:
        if self.token is None:
            self._seen += data
            if len(self._seen) < 32:
                return
            data, self._seen, self.token = self._seen, b"", self._seen[:16]
        seen = self._seen + data
        at = seen.find(self.token)
        if at < 0:
            self._seen = seen[-15:]
            if self._greeted:
                self._frames(data)
        elif len(seen) - at < 32:
            self._seen = seen[at:]
        else:
            self._seen = b""
            self._resync(seen[at + 16 : at + 32])
            self._take(seen[at + 32 :])

    def _resync(self, nonce: bytes) -> None:
        self._parser = FrameParser()
        self._outputs.clear()
        self._execs.clear()
        for container in self.containers.values():
            container.stream = 0
        self._greeted = not self.silent
        if not self.silent:
            self.send_raw(self.stale + nonce)

    def _frames(self, data: bytes) -> None:
        for frame in self._parser.feed(data):
            self._frame(frame)

    def _frame(self, frame: Frame) -> None:
        kind, stream, payload = frame
        if kind is Kind.HELLO:
            self._hello(pb.Hello.FromString(bytes(payload)))
        elif kind is Kind.REQUEST:
            self._request(stream, self._decode(bytes(payload)))
        elif kind is Kind.DATA:
            self.stdin += payload
            self._echo(stream, bytes(payload))
        elif kind is Kind.WINDOW:
            self._window(stream, decode_credit(payload))
        elif kind is Kind.CLOSE:
            for name, run in list(self._execs.items()):
                if run.request.stdin_stream == stream:
                    self._end(name, run.program.exit_code)
        elif kind is Kind.RESET:
            self.resets.append(stream)
            if self._outputs.pop(stream, None) is not None:
                self.send(Kind.CLOSE, stream)

    def _hello(self, hello: pb.Hello) -> None:
        self.hellos.append(hello)
        states = [
            pb.ContainerState(
                id=id,
                state=pb.ContainerState.EXITED if c.exited else pb.ContainerState.RUNNING,
                exited=c.exited,
                log_start=c.log_start,
                log_end=c.log_end,
            )
            for id, c in self.containers.items()
        ]
        welcome = pb.Welcome(
            version=self._choose(hello),
            min_version=self.versions[0],
            max_version=self.versions[1],
            epoch=hello.epoch + self.wrong_epoch,
            agent="fake",
            kernel="0.0-fake",
            containers=states,
            now_ns=self.now_ns,
        )
        self.send(Kind.WELCOME, 0, self.welcome or welcome.SerializeToString())
        self._greeted = welcome.version != 0  # else everything up to the next preamble is ignored
        self.connected.set()

    def _choose(self, hello: pb.Hello) -> int:
        """The highest common version; 0: there is none."""
        version = min(hello.version, self.versions[1])
        return version if version >= max(hello.min_version, self.versions[0]) else 0

    def _decode(self, payload: bytes) -> pb.Request:
        """Decode a request as an agent of these versions does; what it does not know has no body."""
        if self.versions[1] > 1:
            return pb.Request.FromString(payload)
        tag, length = payload[0], payload[1]
        assert length < 0x80 and len(payload) == 2 + length, "one short message"
        match tag:
            case 0x22:  # number 4
                return pb.Request(signal=pb.Signal.FromString(payload[2:]))
            case 0x2A:
                return pb.Request(remove=pb.Remove.FromString(payload[2:]))
            case 0x42:
                return pb.Request(open_log=pb.OpenLog.FromString(payload[2:]))
        return pb.Request()

    def _window(self, stream: int, credit: int) -> None:
        output = self._outputs.get(stream)
        if output is None:
            return
        output.credit += credit
        if output.log is not None:
            del output.log.log[:credit]
            output.log.log_start += credit
            assert output.log.log_start <= output.sent, "acknowledged more than was sent"
            self.on_acknowledged(output.log.log_start)
            self._pump_log(output.log)
        else:
            self._pump(stream, output)

    # ------------------------------------------------------------------------------ requests

    def _request(self, id: int, request: pb.Request) -> None:
        self.requests.append(request)
        reply = self.answer(request)
        if reply is True:
            reply = self._default(request)
        if isinstance(reply, pb.Reply):
            self.send(Kind.REPLY, id, reply.SerializeToString())
        self._after(request, isinstance(reply, pb.Reply) and not reply.HasField("failure"))

    def _default(self, request: pb.Request) -> pb.Reply:
        match request.WhichOneof("body"):
            case "start":
                self.containers[request.start.id] = FakeContainer()
                return pb.Reply(started=pb.Started(pid=1))
            case "exec":
                if request.exec.process.argv[0] in self.programs:
                    return pb.Reply(started=pb.Started(pid=2))
                return pb.Reply(failure=pb.Failure(step="exec", errno=2, message="no such program"))
            case "signal":
                return self._signal(request.signal)
            case "open_log":
                log = self.containers[request.open_log.container_id]
                opened = min(max(request.open_log.offset, log.log_start), log.log_end)
                del log.log[: opened - log.log_start]
                log.log_start = opened
                return pb.Reply(log_opened=pb.LogOpened(offset=opened))
            case "find_disk":
                self.disks.append(request.find_disk.serial)
                number = len(self.disks) - 1
                return pb.Reply(disk=pb.DiskFound(name=f"vd{chr(97 + number)}", major=254, minor=16 * number))
            case "remove":
                self.containers.pop(request.remove.container_id, None)
        return pb.Reply()

    def _signal(self, signal: pb.Signal) -> pb.Reply:
        self.signals.append(signal)
        if signal.exec_id and signal.exec_id not in self._execs:
            return pb.Reply(failure=pb.Failure(step="signal", errno=3, message="no such process"))
        return pb.Reply()

    def _after(self, request: pb.Request, good: bool) -> None:
        """What follows a reply."""
        match request.WhichOneof("body"):
            case "start" if good and request.start.log_stream:
                self._open_log(request.start.id, request.start.log_stream, request.start.log_window)
            case "open_log" if good:
                opened = request.open_log
                self._open_log(opened.container_id, opened.stream, opened.window)
            case "exec" if good:
                self._run(request.exec)
            case "signal" if good and request.signal.exec_id:
                self._end(request.signal.exec_id, 128 + request.signal.signal)
            case "signal" if good and request.signal.container_id in self.containers:
                self.exit(request.signal.container_id, 128 + request.signal.signal)

    def _open_log(self, id: str, stream: int, window: int) -> None:
        container = self.containers[id]
        container.stream = stream
        self._outputs[stream] = _Output(window, log=container, sent=container.log_start)
        self._pump_log(container)

    def _run(self, request: pb.Exec) -> None:
        program = self.programs[request.process.argv[0]]
        self._execs[request.exec_id] = _Exec(request, program)
        for stream, text in (
            (request.stdout_stream, program.stdout),
            (request.stderr_stream, program.stderr),
        ):
            if stream:
                self._outputs[stream] = _Output(request.window, bytearray(text))
                self._pump(stream, self._outputs[stream])
        if request.stdin_stream:
            self.send_raw(encode_credit(request.stdin_stream, self.stdin_window))
        if not (program.until_killed or program.reads_stdin):
            self._end(request.exec_id, program.exit_code)

    def _echo(self, stream: int, data: bytes) -> None:
        for run in self._execs.values():
            if run.request.stdin_stream == stream and run.program.reads_stdin:
                self.send_raw(encode_credit(stream, len(data)))
                output = self._outputs[run.request.stdout_stream]
                output.pending += data
                self._pump(run.request.stdout_stream, output)

    def _end(self, exec_id: str, exit_code: int) -> None:
        run = self._execs.pop(exec_id)
        for stream in (run.request.stdout_stream, run.request.stderr_stream):
            if stream in self._outputs and not (run.program.keeps_outputs_open and exit_code < 128):
                self._outputs[stream].ending = True
                self._pump(stream, self._outputs[stream])
        exited = pb.Exited(container_id=run.request.container_id, exec_id=exec_id, exit_code=exit_code)
        self.send(Kind.EVENT, 0, pb.Event(exited=exited).SerializeToString())

    # ------------------------------------------------------------------------------ outgoing

    def _pump(self, stream: int, output: _Output) -> None:
        while output.pending and output.credit:
            count = min(len(output.pending), output.credit, MAX_DATA)
            self.send(Kind.DATA, stream, bytes(output.pending[:count]))
            del output.pending[:count]
            output.credit -= count
        if output.ending and not output.pending:
            del self._outputs[stream]
            self.send(Kind.CLOSE, stream)

    def _pump_log(self, container: FakeContainer) -> None:
        output = self._outputs.get(container.stream)
        if output is None:
            return
        while output.credit and output.sent < container.log_end:
            at = output.sent - container.log_start
            count = min(container.log_end - output.sent, output.credit, self.piece)
            self.send(Kind.DATA, container.stream, bytes(container.log[at : at + count]))
            output.sent += count
            output.credit -= count
        if container.exited and output.sent == container.log_end and not output.ending:
            output.ending = True
            self.send(Kind.CLOSE, container.stream)
