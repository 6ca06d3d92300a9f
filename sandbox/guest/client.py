"""The host's end of the conversation with one agent.

A client is one connection: when it is lost, every waiter is woken with the reason, and the owner
connects anew with a higher epoch; the Welcome then tells all that happened in between. A daemon
that is killed leaves nothing behind: the guest ends the execs of the old connection, and keeps the
containers and the log bytes that were not acknowledged.

The guest is hostile. Whatever breaks a rule (a frame that has no meaning now, an answer to no
question, data on no stream or above its credit, a flood of events) is a ProtocolError and ends the
connection; waits are bounded; nothing that the guest sends is kept without a bound.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any, NewType, TypeVar

from google.protobuf.message import DecodeError

from sandbox.errors import (
    DeadlineExceeded,
    GuestError,
    GuestUnreachable,
    InvalidContainerConfig,
    ProtocolError,
    VersionMismatch,
)
from sandbox.guest import guest_pb2 as pb
from sandbox.guest import transports
from sandbox.guest.connection import Connection
from sandbox.guest.frames import MIN_VERSION, NONCE_BYTES, VERSION, Frame, Kind, preamble
from sandbox.guest.streams import Inputs, OutputStream, StreamSink

RequestId = NewType("RequestId", int)
M = TypeVar("M", pb.Welcome, pb.Reply, pb.Event)

MAX_CALLS = 1024  # unanswered, given-up ones included
MAX_EVENTS_PER_S = 2000
_MAX_TEXT = 1024  # of an error message that the guest wrote
# Steps of the agent that do no more than what a client wrote down.
_OF_WISHES = frozenset({"exec", "chdir", "cgroup", "sysctl", "huge"})
_MAX_ID = (1 << 32) - 1


class GuestClient:
    """Use `connect`. All methods belong to the event loop's thread."""

    def __init__(self, on_event: Callable[[pb.Event], None], epoch: int, nonce: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._epoch = epoch
        self._connection = Connection(nonce, self._on_frame, self._on_writable)
        self._connection.lost.add_done_callback(self._on_lost)
        self._welcome: asyncio.Future[pb.Welcome] = loop.create_future()
        self.welcomed_s = 0.0  # moment of the monotonic clock
        self._calls: dict[int, asyncio.Future[pb.Reply]] = {}
        self._exits: dict[str, asyncio.Future[pb.Exited]] = {}
        self._detached: dict[str, asyncio.Future[pb.Detached]] = {}
        self._inputs = Inputs(self._connection)
        self._outputs: dict[int, OutputStream] = {}
        self._last_call = 0
        self._last_stream = 0
        self._last_exec = 0
        self._events_second = 0
        self._events_seen = 0

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        token: bytes,
        epoch: int,
        on_event: Callable[[pb.Event], None],
        timeout_s: float,
        snapshot: bool = False,
    ) -> GuestClient:
        """Connect and greet; `on_event` may be called before this returns. With `snapshot` the VM is about
        to become a template: its agent greets, and then waits for whoever meets a copy of it.

        Raises GuestUnreachable (ProtocolError, VersionMismatch), or DeadlineExceeded when the
        agent does not answer in time.
        """
        nonce = os.urandom(NONCE_BYTES)
        client = cls(on_event, epoch, nonce)
        try:
            async with asyncio.timeout(timeout_s):
                await client._greet(address, preamble(token, nonce), timeout_s, snapshot)
        except TimeoutError as cause:
            client._connection.fail(GuestUnreachable(f"no answer of the agent at {address}"))
            raise DeadlineExceeded(f"greeting the agent at {address}", timeout_s) from cause
        except BaseException:
            client._connection.fail(GuestUnreachable("greeting was given up"))
            raise
        return client

    async def _greet(self, address: str, opening: bytes, timeout_s: float, snapshot: bool) -> None:
        sock = await transports.connect(address, timeout_s)
        try:
            loop = asyncio.get_running_loop()
            await loop.create_unix_connection(lambda: self._connection, sock=sock)
        except BaseException:
            sock.close()
            raise
        self._connection.write(opening)
        await self._connection.ready
        # Only now: a HELLO that waited in a queue while the guest booted would set its clock back.
        hello = pb.Hello(
            version=VERSION,
            min_version=MIN_VERSION,
            epoch=self._epoch,
            wall_ns=time.time_ns(),
            snapshot=snapshot,
        )
        self._connection.send(Kind.HELLO, 0, hello.SerializeToString())
        await self._welcome

    # ------------------------------------------------------------------------------- its life

    @property
    def welcome(self) -> pb.Welcome:
        return self._welcome.result()

    @property
    def version(self) -> int:
        """The protocol version of this connection: the highest that both sides speak."""
        return self.welcome.version

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def lost(self) -> bool:
        return self._connection.lost.done()

    def on_lost(self, callback: Callable[[GuestUnreachable], None]) -> Callable[[], None]:
        """Call back once, from the loop, with the reason; also when it is lost already.
        What is returned takes the wish back."""

        def told(lost: asyncio.Future[GuestUnreachable]) -> None:
            callback(lost.result())

        def take_back() -> None:
            self._connection.lost.remove_done_callback(told)

        self._connection.lost.add_done_callback(told)
        return take_back

    async def wait_closed(self) -> GuestUnreachable:
        """Return the reason once the connection is lost or closed."""
        return await asyncio.shield(self._connection.lost)

    async def close(self) -> None:
        """Let go of the guest. Idempotent."""
        await self._connection.close()

    def _on_lost(self, lost: asyncio.Future[GuestUnreachable]) -> None:
        reason = lost.result()
        waiters: list[asyncio.Future[Any]]
        waiters = [self._welcome, *self._calls.values(), *self._exits.values(), *self._detached.values()]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(reason)
                waiter.exception()  # seen, even if nobody waits any more
        for output in self._outputs.values():
            output.wake()
        self._calls.clear()
        self._exits.clear()
        self._detached.clear()
        self._outputs.clear()

    # ---------------------------------------------------------------------------------- calls

    async def call(self, request: pb.Request, timeout_s: float) -> pb.Reply:
        """Raises GuestError when the agent refuses, GuestUnreachable when the connection is lost,
        DeadlineExceeded when no reply came (what was asked for may still happen).
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self.post(request)
        except TimeoutError as cause:
            raise DeadlineExceeded(f"{request.WhichOneof('body')} in the guest", timeout_s) from cause

    def post(self, request: pb.Request) -> asyncio.Future[pb.Reply]:
        """Send now, and return the reply to come; it ends in GuestError or GuestUnreachable.

        A future that is cancelled still counts until the guest answers. Raises GuestUnreachable.
        """
        if len(self._calls) >= MAX_CALLS:
            self._connection.fail(ProtocolError(f"the guest left {MAX_CALLS} requests unanswered"))
        id = self._next_call()
        self._connection.send(Kind.REQUEST, id, request.SerializeToString())
        reply: asyncio.Future[pb.Reply] = asyncio.get_running_loop().create_future()
        self._calls[id] = reply
        return reply

    def _next_call(self) -> RequestId:
        while True:
            self._last_call = self._last_call % _MAX_ID + 1
            if self._last_call not in self._calls:
                return RequestId(self._last_call)

    # -------------------------------------------------------------------------------- streams

    def open_input(self, sink: StreamSink, window: int) -> int:
        """Number a guest-to-host stream. The request that names it must give the same window."""
        stream = self._next_stream()
        self._inputs.open(stream, sink, window)
        return stream

    def grant(self, stream: int, count: int) -> None:
        """Return credit for what the sink has dealt with. Does nothing on a stream that has ended."""
        self._inputs.grant(stream, count)

    def reset_input(self, stream: int) -> None:
        """Tell the guest to stop this stream. Does nothing on a stream that has ended."""
        self._inputs.reset(stream)

    def open_output(self) -> OutputStream:
        """Number a host-to-guest stream, to be named in a request. Close it in the end."""
        self._outputs = {id: output for id, output in self._outputs.items() if not output.done}
        output = OutputStream(self._next_stream(), self._connection)
        self._outputs[output.id] = output
        return output

    def _next_stream(self) -> int:
        if self._connection.lost.done():
            raise self._connection.lost.result()
        self._last_stream += 1  # 32 bits last for years of execs, and begin anew per connection
        return self._last_stream

    # ---------------------------------------------------------------------------------- execs

    def expect_exit(self, exec_id: str) -> asyncio.Future[pb.Exited]:
        """The exit of an exec about to be started, which then does not go to `on_event`.

        Raises GuestUnreachable. Take it back with `forget_exit`.
        """
        if self._connection.lost.done():
            raise self._connection.lost.result()
        return self._exits.setdefault(exec_id, asyncio.get_running_loop().create_future())

    def forget_exit(self, exec_id: str) -> None:
        self._exits.pop(exec_id, None)

    def expect_detached(self, attach_id: str) -> asyncio.Future[pb.Detached]:
        """The end of an attachment about to be made. Take it back with `forget_detached`.

        Raises GuestUnreachable.
        """
        if self._connection.lost.done():
            raise self._connection.lost.result()
        return self._detached.setdefault(attach_id, asyncio.get_running_loop().create_future())

    def forget_detached(self, attach_id: str) -> None:
        self._detached.pop(attach_id, None)

    def next_exec_id(self) -> str:
        """Also good for an attachment."""
        self._last_exec += 1
        return f"{self._epoch}-{self._last_exec}"

    # ----------------------------------------------------------------------- what the guest says

    def _on_writable(self) -> None:
        self._inputs.flush()

    def _on_frame(self, frame: Frame) -> None:
        """Raises ProtocolError."""
        kind, stream, payload = frame
        assert isinstance(payload, memoryview)
        if not self._welcome.done():
            self._on_welcome(kind, payload)
        elif kind is Kind.DATA:
            self._inputs.data(stream, payload)
        elif kind is Kind.REPLY:
            self._on_reply(stream, payload)
        elif kind is Kind.EVENT:
            self._on_event_frame(payload)
        elif kind is Kind.CLOSE:
            self._inputs.closed(stream)
        elif kind is Kind.WINDOW or kind is Kind.RESET:
            self._on_output_frame(kind, stream, payload)
        else:
            raise ProtocolError(f"the guest sent {kind.name} where it has no meaning")

    def _on_welcome(self, kind: Kind, payload: memoryview) -> None:
        if kind is not Kind.WELCOME:
            raise ProtocolError(f"the guest sent {kind.name} in front of its WELCOME")
        welcome = _decode(pb.Welcome, payload)
        if not MIN_VERSION <= welcome.version <= VERSION:
            spoken = (welcome.min_version or welcome.version, welcome.max_version or welcome.version)
            self._connection.fail(VersionMismatch(spoken, (MIN_VERSION, VERSION)))
        elif welcome.epoch != self._epoch:
            raise ProtocolError(f"the guest welcomed epoch {welcome.epoch}, not {self._epoch}")
        else:
            self.welcomed_s = time.monotonic()
            self._welcome.set_result(welcome)

    def _on_reply(self, id: int, payload: memoryview) -> None:
        reply = _decode(pb.Reply, payload)  # first: if it is broken, the waiter must wake all the same
        waiter = self._calls.pop(id, None)
        if waiter is None:
            raise ProtocolError(f"the guest answered request {id}, which nobody made")
        if waiter.done():  # given up
            return
        if reply.HasField("failure"):
            waiter.set_exception(_refusal(reply.failure))
            waiter.exception()
        else:
            waiter.set_result(reply)

    def _on_event_frame(self, payload: memoryview) -> None:
        second = int(asyncio.get_running_loop().time())
        if second != self._events_second:
            self._events_second, self._events_seen = second, 0
        self._events_seen += 1
        if self._events_seen > MAX_EVENTS_PER_S:
            raise ProtocolError(f"the guest sent more than {MAX_EVENTS_PER_S} events in a second")
        event = _decode(pb.Event, payload)
        body = event.WhichOneof("body")
        if body == "exited" and event.exited.exec_id in self._exits:
            waiter = self._exits.pop(event.exited.exec_id)
            if not waiter.done():
                waiter.set_result(event.exited)
        elif body == "detached":
            ended = self._detached.pop(event.detached.attach_id, None)
            if ended is not None and not ended.done():
                ended.set_result(event.detached)
        else:
            self._on_event(event)

    def _on_output_frame(self, kind: Kind, stream: int, payload: memoryview) -> None:
        output = self._outputs.get(stream)
        if output is None:
            # It may have been under way while we closed; a number never given out cannot.
            if not 0 < stream <= self._last_stream:
                raise ProtocolError(f"the guest sent {kind.name} on stream {stream}, which never was")
        elif kind is Kind.WINDOW:
            output.window(payload)
        else:
            output.reset()


def _refusal(failure: pb.Failure) -> GuestError:
    kind = InvalidContainerConfig if failure.step.partition(" ")[0] in _OF_WISHES else GuestError
    return kind(failure.step[:_MAX_TEXT], failure.errno, failure.message[:_MAX_TEXT])


def _decode(kind: type[M], payload: memoryview) -> M:
    try:
        return kind.FromString(bytes(payload))
    except DecodeError as cause:
        raise ProtocolError(f"the guest sent a broken {kind.__name__}") from cause
