"""Every rpc with arbitrary messages and with mutated valid ones: a fitting code, nothing left behind, and a
daemon that answers the next call."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cri.proto import runtime_v1_pb2 as pb
from cri.server import MESSAGE_MAX
from sandbox.host.mounts import mounts_below
from tests.fakes.registry import FakeRegistry, Hang
from tests.fuzz.served import METHODS, Served
from tests.kit.messages import any_message, field_edges, message_class, near, set_at

T = TypeVar("T")
Code = grpc.StatusCode
UNARY = [name for name, (_, method) in METHODS.items() if not method.server_streaming]

# Codes that a client may get for its own request. INTERNAL and UNKNOWN mean that the daemon is at fault,
# UNAVAILABLE that a guest or a registry is.
FITTING = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.FAILED_PRECONDITION,
    Code.UNIMPLEMENTED,
    Code.UNAUTHENTICATED,  # by a registry
    Code.RESOURCE_EXHAUSTED,  # beyond the node
}


class Site:
    def __init__(self, root: Path, registry: FakeRegistry) -> None:
        self.runner = asyncio.Runner()
        self.served = Served(root, registry)
        self.run(self.served.start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def close(self) -> None:
        self.run(self.served.stop())
        self.runner.close()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    # short, for the sockets in it
    root = Path(tempfile.mkdtemp(prefix="husk-rpcs-"))
    with FakeRegistry().serving() as registry, pytest.MonkeyPatch.context() as patch:
        # each test waits for what is written after a pull
        patch.setattr("image.image_store.SYNC_DELAY_S", 0.0)
        site = Site(root, registry)
        yield site
        site.close()
    assert mounts_below(root) == []
    shutil.rmtree(root)


async def try_one(served: Served, name: str, request: Message | bytes) -> None:
    before = await served.settle()
    code, answer, details = await served.call(name, request)
    assert code in FITTING, f"{name}: {code}: {details}\n{request!r}"
    if code is not Code.OK:
        assert details, f"{name}: {code} without a word"
        now = await served.settle(before)
        assert now == before, f"{name} was refused ({details}) and left {now - before}, took {before - now}"
    for follower, message in served.follow(name, answer) if code is Code.OK else ():
        code, _, details = await served.call(follower, message)
        assert code in FITTING, f"{follower} after {name}: {code}: {details}\n{request!r}"
    if code is Code.OK:
        undone = await served.undo(name, answer)
        now = await served.settle(before if undone else None)
        if now != before and not undone:
            await served.clear()
            before, now = served.empty, await served.settle(served.empty)
        assert now == before, f"{name} left {now - before}, took {before - now}"
    await served.good("Version", pb.VersionRequest())


FUZZ = settings(
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)


@pytest.mark.parametrize("name", METHODS)
@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_valid_request_with_mutations_leaves_no_trace_when_refused(
    site: Site, name: str, data: st.DataObject
) -> None:
    served = site.served
    base = site.run(served.prepare())
    request = data.draw(near(served.valid(name, base), base.words))
    site.run(try_one(served, name, served.fenced(request)))


@pytest.mark.parametrize("name", METHODS)
@settings(FUZZ, max_examples=10)
@given(data=st.data())
def test_arbitrary_message_leaves_no_trace_when_refused(site: Site, name: str, data: st.DataObject) -> None:
    served = site.served
    base = site.run(served.prepare())
    request = data.draw(any_message(message_class(METHODS[name][1].input_type), base.words))
    site.run(try_one(served, name, served.fenced(request)))


@pytest.mark.parametrize("name", ["RunPodSandbox", "CreateContainer", "UpdateContainerResources"])
def test_each_field_at_its_boundary_values(site: Site, name: str) -> None:
    """Only of the large requests, which have too many fields to be covered by chance."""
    served = site.served
    for path, value in field_edges(METHODS[name][1].input_type):
        request = served.valid(name, site.run(served.prepare()))
        set_at(request, path, value)
        site.run(try_one(served, name, served.fenced(request)))


# ------------------------------------------------------------------------------------- the wire


@pytest.mark.parametrize("name", METHODS)
@settings(FUZZ, max_examples=10)
@given(data=st.data())
def test_malformed_bytes_are_refused(site: Site, name: str, data: st.DataObject) -> None:
    """Arbitrary bytes, and valid requests that are truncated or have a byte changed."""
    served = site.served
    base = site.run(served.prepare())
    raw = served.valid(name, base).SerializeToString()
    if raw and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw = data.draw(st.sampled_from([raw[:at], raw[:at] + b"\xff" + raw[at + 1 :], raw + raw[at:]]))
    else:
        raw = data.draw(st.binary(max_size=60))
    kind = message_class(METHODS[name][1].input_type)
    try:
        request: Message | bytes = served.fenced(kind.FromString(raw))
    except DecodeError:
        request = raw
    site.run(try_one(served, name, request))


@pytest.mark.parametrize("name", METHODS)
def test_message_that_is_too_large_is_refused(site: Site, name: str) -> None:
    async def check() -> None:
        served = site.served
        await served.prepare()
        before = await served.settle()
        # an unknown field, which no message minds
        data = b"\xfa\x3f" + _varint(MESSAGE_MAX) + bytes(MESSAGE_MAX)
        code, _, details = await served.call(name, data, 30)
        assert code is Code.RESOURCE_EXHAUSTED, details
        assert await served.settle(before) == before
        await served.good("Version", pb.VersionRequest())

    site.run(check())


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # and empty SETTINGS


@settings(FUZZ, max_examples=40)
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=4), st.booleans())
def test_bytes_that_are_not_http2_do_not_disturb_others(
    site: Site, pieces: list[bytes], greets: bool
) -> None:
    """A client that may open the socket cannot stop the daemon from answering others."""

    async def check() -> None:
        served = site.served
        before = await served.settle()
        _, writer = await asyncio.open_unix_connection(str(served.socket))
        for piece in [PREFACE] * greets + pieces:
            writer.write(piece)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        await served.good("Version", pb.VersionRequest())
        writer.close()
        assert await served.settle(before) == before

    site.run(check())


# --------------------------------------------------------------------- clients that go away


async def after(served: Served, name: str) -> None:
    """Assert that the daemon lists what an abandoned call made, and that removing it leaves nothing."""
    # one connection keeps the order, so a call that was left at once has arrived when this is answered
    await served.good("Version", pb.VersionRequest())
    await served.settle()
    listed = await served.good("ListPodSandbox", pb.ListPodSandboxRequest())
    assert {item.id for item in listed.items} == set(served.daemon.inventory.pods)
    await served.clear()
    now = await served.settle(served.empty)
    assert now == served.empty, f"{name} left {now - served.empty}, took {served.empty - now}"


@pytest.mark.parametrize("name", UNARY)
@settings(FUZZ, max_examples=8)
@given(turns=st.integers(0, 60), deadline_us=st.none() | st.integers(1, 20_000))
def test_client_that_cancels_or_times_out_leaves_no_trace(
    site: Site, name: str, turns: int, deadline_us: int | None
) -> None:
    """It cancels after a number of iterations of the event loop, or by a deadline."""

    async def check() -> None:
        served = site.served
        request = served.valid(name, await served.prepare())
        timeout_s = deadline_us / 10**6 if deadline_us else None
        call = asyncio.ensure_future(served.call(name, request, timeout_s))
        for _ in range(turns):
            await asyncio.sleep(0)
        if timeout_s is None:
            call.cancel()
        await asyncio.wait({call})
        if not call.cancelled():
            assert call.result()[0] in {*FITTING, Code.DEADLINE_EXCEEDED, Code.CANCELLED}
        await after(served, name)

    site.run(check())


@pytest.mark.parametrize("name", UNARY)
def test_deadline_while_registry_and_guests_hang_leaves_no_trace(site: Site, name: str) -> None:
    """The client's deadline passes first; then the guests' connections break, which ends the calls."""

    async def check() -> None:
        served = site.served
        request = served.valid(name, await served.prepare())
        served.held_up = True
        served.registry.fail("/manifests/", Hang(), times=1)
        try:
            code, _, details = await served.call(name, request, 0.2)
        finally:
            served.held_up = False
            served.registry.forget_faults()
        assert code in {*FITTING, Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE}, details
        for agent in served.agents:
            agent.drop()
        await after(served, name)

    site.run(check())
