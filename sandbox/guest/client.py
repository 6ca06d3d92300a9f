"""The host's end of a connection to an agent.

A client is one connection. When it is lost, every waiter is woken with the reason, and the owner connects
again with a higher epoch; the Welcome then shows everything that happened in between. A daemon that is
killed leaves no state in the guest but what the next one needs: the agent ends the execs of the old
connection, and keeps the containers and the log bytes that were not acknowledged.

The guest is hostile. Any violation of the protocol (a frame that is not valid at this point, a reply to no
request, data on an unknown stream or above its credit, more than MAX_EVENTS_PER_S events) is a ProtocolError
and ends the connection; waits are bounded; nothing that the guest sends is kept without a bound.
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
from sandbox.guest import transports, versions
from sandbox.guest.connection import GuestConnection
from sandbox.guest.frames import MIN_VERSION, NONCE_BYTES, VERSION, Frame, Kind, preamble
from sandbox.guest.streams import Inputs, OutputStream, StreamSink

RequestId = NewType("RequestId", int)
M = TypeVar("M", pb.Welcome, pb.Reply, pb.Event)

MAX_CALLS = 1024  # requests without a reply, those whose caller has gone included
MAX_EVENTS_PER_S = 2000
_MAX_TEXT = 1024  # of an error message that the guest wrote
# Steps of the agent that fail because of what the container's configuration or image says.
_CONFIG_STEPS = frozenset({"exec", "chdir", "cgroup", "sysctl", "huge"})
_MAX_ID = (1 << 32) - 1


class GuestClient:
    """A connection to an agent: requests, streams, execs and events. Make one with `connect`.

    All methods must be called in the event loop's thread. The caller owns the client, and closes it.
    """

    def __init__(
        self, on_event: Callable[[pb.Event], None], epoch: int, nonce: bytes, foreign: int = 0
    ) -> None:
        loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._epoch = epoch
        self._foreign = foreign
        self._connection = GuestConnection(nonce, self._on_frame, self._on_writable)
        self._connection.lost.add_done_callback(self._on_lost)
        self._welcome: asyncio.Future[pb.Welcome] = loop.create_future()
        self.welcomed_s = 0.0  # when the Welcome came, on the monotonic clock
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
        foreign: int = 0,
    ) -> GuestClient:
        """Connect and exchange Hello and Welcome. `on_event` may be called before this returns.

        `token` identifies the VM: the agent adopts the first one it receives and ignores connections with
        any other. `epoch` must grow with each connection. With `snapshot` the VM is about to be saved as a
        template: after the Welcome its agent waits for the first connection to a clone, and adopts that
        one's token. `foreign` is the protocol version of an agent that speaks none of ours: then only the
        requests that all versions have can be made (see `versions`).

        Raises GuestUnreachable (ProtocolError; VersionMismatch if there is no common protocol version), or
        DeadlineExceeded when the agent does not answer within `timeout_s`.
        """
        nonce = os.urandom(NONCE_BYTES)
        client = cls(on_event, epoch, nonce, foreign)
        try:
            async with asyncio.timeout(timeout_s):
                await client._exchange_hello(address, preamble(token, nonce), timeout_s, snapshot)
        except TimeoutError as cause:
            client._connection.fail(GuestUnreachable(f"the agent at {address} does not answer"))
            raise DeadlineExceeded(f"greeting the agent at {address}", timeout_s) from cause
        except BaseException:
            client._connection.fail(GuestUnreachable("connecting to the agent was cancelled"))
            raise
        return client

    async def _exchange_hello(self, address: str, opening: bytes, timeout_s: float, snapshot: bool) -> None:
        sock = await transports.connect(address, timeout_s)
        try:
            loop = asyncio.get_running_loop()
            await loop.create_unix_connection(lambda: self._connection, sock=sock)
        except BaseException:
            sock.close()
            raise
        self._connection.write(opening)
        await self._connection.ready
        # Not earlier: a HELLO that waited in a queue while the guest booted would set its clock back.
        if self._foreign:
            hello = versions.hello(self._foreign, self._epoch)
        else:
            hello = pb.Hello(
                version=VERSION,
                min_version=MIN_VERSION,
                epoch=self._epoch,
                wall_ns=time.time_ns(),
                snapshot=snapshot,
            )
        self._connection.send(Kind.HELLO, 0, hello.SerializeToString())
        await self._welcome

    # ------------------------------------------------------------------------------ lifetime

    @property
    def welcome(self) -> pb.Welcome:
        """The agent's Welcome, as the guest sent it: not trusted."""
        return self._welcome.result()

    @property
    def version(self) -> int:
        """The protocol version of this connection: the highest that both sides speak."""
        return self.welcome.version

    @property
    def foreign(self) -> bool:
        """Whether the agent speaks no version of ours, so that only a few requests can be made."""
        return self._foreign != 0

    @property
    def epoch(self) -> int:
        """The number of this connection to the VM."""
        return self._epoch

    @property
    def lost(self) -> bool:
        """Whether the connection is lost or closed."""
        return self._connection.lost.done()

    def on_lost(self, callback: Callable[[GuestUnreachable], None]) -> Callable[[], None]:
        """Call `callback` once from the loop with the reason, also if the connection is lost already.

        Returns a function that removes the callback. Idempotent.
        """

        def on_done(lost: asyncio.Future[GuestUnreachable]) -> None:
            callback(lost.result())

        def remove() -> None:
            self._connection.lost.remove_done_callback(on_done)

        self._connection.lost.add_done_callback(on_done)
        return remove

    async def wait_closed(self) -> GuestUnreachable:
        """Return the reason once the connection is lost or closed."""
        return await asyncio.shield(self._connection.lost)

    def fail(self, reason: GuestUnreachable) -> None:
        """Drop the connection, and wake every waiter with this reason. Without effect once it is lost."""
        self._connection.fail(reason)

    async def close(self) -> None:
        """Send what is queued, then close the connection. Containers run on. Idempotent."""
        await self._connection.close()

    def _on_lost(self, lost: asyncio.Future[GuestUnreachable]) -> None:
        reason = lost.result()
        waiters: list[asyncio.Future[Any]]
        waiters = [self._welcome, *self._calls.values(), *self._exits.values(), *self._detached.values()]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(reason)
                waiter.exception()  # marks it retrieved: there may be no waiter any more
        for output in self._outputs.values():
            output.wake()
        self._calls.clear()
        self._exits.clear()
        self._detached.clear()
        self._outputs.clear()

    # ---------------------------------------------------------------------------------- calls

    async def call(self, request: pb.Request, timeout_s: float) -> pb.Reply:
        """Send a request and wait for its reply.

        Raises GuestError when the agent reports a failure (InvalidContainerConfig: one of the container's
        configuration or image), GuestUnreachable when the connection is lost, DeadlineExceeded when no reply
        came in time (the request may still take effect).
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self.post(request)
        except TimeoutError as cause:
            raise DeadlineExceeded(f"{request.WhichOneof('body')} in the guest", timeout_s) from cause

    def post(self, request: pb.Request) -> asyncio.Future[pb.Reply]:
        """Queue a request and return the future of its reply; it may end in GuestError or GuestUnreachable.

        A cancelled future still counts towards MAX_CALLS until the guest replies. Raises GuestUnreachable.
        """
        foreign = self._foreign
        payload = versions.encode_request(request, foreign) if foreign else request.SerializeToString()
        if len(self._calls) >= MAX_CALLS:
            self._connection.fail(ProtocolError(f"the guest left {MAX_CALLS} requests unanswered"))
        id = self._next_call()
        self._connection.send(Kind.REQUEST, id, payload)
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
        """Number a guest-to-host stream. The request that names it must carry the same window (bytes).

        Raises GuestUnreachable.
        """
        stream = self._next_stream()
        self._inputs.open(stream, sink, window)
        return stream

    def grant(self, stream: int, count: int) -> None:
        """Return credit: `count` bytes that the sink has processed. Without effect on an ended stream."""
        self._inputs.grant(stream, count)

    def reset_input(self, stream: int) -> None:
        """Send RESET, and discard what is still on its way. Without effect on an ended stream."""
        self._inputs.reset(stream)

    def open_output(self) -> OutputStream:
        """Number a host-to-guest stream, to be named in a request. The caller closes it.

        Raises GuestUnreachable.
        """
        self._outputs = {id: output for id, output in self._outputs.items() if not output.done}
        output = OutputStream(self._next_stream(), self._connection)
        self._outputs[output.id] = output
        return output

    def _next_stream(self) -> int:
        if self._connection.lost.done():
            raise self._connection.lost.result()
        self._last_stream += 1  # 32 bits last for years of execs, and each connection starts at 1
        return self._last_stream

    # ---------------------------------------------------------------------------------- execs

    def expect_exit(self, exec_id: str) -> asyncio.Future[pb.Exited]:
        """Return the future of the exit of an exec about to be started; `on_event` does not get that exit.

        The caller ends this with `forget_exit`. Raises GuestUnreachable.
        """
        if self._connection.lost.done():
            raise self._connection.lost.result()
        return self._exits.setdefault(exec_id, asyncio.get_running_loop().create_future())

    def forget_exit(self, exec_id: str) -> None:
        """Stop expecting an exit. Idempotent."""
        self._exits.pop(exec_id, None)

    def expect_detached(self, attach_id: str) -> asyncio.Future[pb.Detached]:
        """Return the future of the end of an attachment about to be made.

        The caller ends this with `forget_detached`. Raises GuestUnreachable.
        """
        if self._connection.lost.done():
            raise self._connection.lost.result()
        return self._detached.setdefault(attach_id, asyncio.get_running_loop().create_future())

    def forget_detached(self, attach_id: str) -> None:
        """Stop expecting the end of an attachment. Idempotent."""
        self._detached.pop(attach_id, None)

    def next_exec_id(self) -> str:
        """Return an id for an exec or an attachment, unique in the VM."""
        self._last_exec += 1
        return f"{self._epoch}-{self._last_exec}"

    # ---------------------------------------------------------------------------- incoming

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
            raise ProtocolError(f"the guest sent {kind.name}, which only the host may send")

    def _on_welcome(self, kind: Kind, payload: memoryview) -> None:
        if kind is not Kind.WELCOME:
            raise ProtocolError(f"the guest sent {kind.name} before its WELCOME")
        welcome = _decode(pb.Welcome, payload)
        ours = (self._foreign, self._foreign) if self._foreign else (MIN_VERSION, VERSION)
        if not ours[0] <= welcome.version <= ours[1]:
            spoken = (welcome.min_version or welcome.version, welcome.max_version or welcome.version)
            self._connection.fail(VersionMismatch(spoken, ours))
        elif welcome.epoch != self._epoch:
            raise ProtocolError(f"the guest answered with epoch {welcome.epoch}, not {self._epoch}")
        else:
            self.welcomed_s = time.monotonic()
            self._welcome.set_result(welcome)

    def _on_reply(self, id: int, payload: memoryview) -> None:
        reply = _decode(pb.Reply, payload)  # first: if this fails, the end of the connection wakes the waiter
        waiter = self._calls.pop(id, None)
        if waiter is None:
            raise ProtocolError(f"the guest replied to request {id}, which is not pending")
        if waiter.done():  # cancelled
            return
        if reply.HasField("failure"):
            waiter.set_exception(_error_of(reply.failure))
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
            # The frame may have crossed our CLOSE, but only on a stream that was opened once.
            if not 0 < stream <= self._last_stream:
                raise ProtocolError(f"the guest sent {kind.name} on stream {stream}, which was never opened")
        elif kind is Kind.WINDOW:
            output.window(payload)
        else:
            output.reset()


def _error_of(failure: pb.Failure) -> GuestError:
    kind = InvalidContainerConfig if failure.step.partition(" ")[0] in _CONFIG_STEPS else GuestError
    return kind(failure.step[:_MAX_TEXT], failure.errno, failure.message[:_MAX_TEXT])


def _decode(kind: type[M], payload: memoryview) -> M:
    try:
        return kind.FromString(bytes(payload))
    except DecodeError as cause:
        raise ProtocolError(f"the guest sent a broken {kind.__name__} message") from cause
