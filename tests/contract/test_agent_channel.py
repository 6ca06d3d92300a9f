"""The agent's end of the channel, byte by byte: tokens, nonces, versions and broken frames."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sandbox.guest import guest_pb2 as pb
from sandbox.guest.frames import MIN_VERSION, VERSION
from tests.kit.agent import TOKEN, Agent, Guest, RawHost, build, frame, start
from tests.kit.eventually import eventually
from tests.kit.scratch import scratch_dir

PING = frame(3, 77, pb.Request(ping=pb.Ping()).SerializeToString())
HELLO = frame(1, 0, pb.Hello(version=VERSION, epoch=3).SerializeToString())


@pytest.fixture
def host(agent: Agent) -> Iterator[RawHost]:
    host = RawHost(agent.socket)
    host.greet()
    yield host
    host.close()


def resync(host: RawHost) -> pb.Welcome:
    return host.greet()


def test_hello_gets_a_welcome_with_the_guests_state(agent: Agent) -> None:
    host = RawHost(agent.socket)
    welcome = host.greet()
    assert (welcome.version, welcome.epoch) == (VERSION, 7)
    assert (welcome.min_version, welcome.max_version) == (MIN_VERSION, VERSION)
    assert welcome.kernel == os.uname().release
    assert welcome.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert len(welcome.agent) == 16
    assert [phase.name for phase in welcome.phases] == ["agent"]
    assert not host.call(1, pb.Request(ping=pb.Ping())).HasField("failure")
    host.close()


@pytest.mark.parametrize(
    ("lowest", "highest"), [(0, VERSION), (1, VERSION), (VERSION, VERSION), (VERSION, 99), (1, 99)]
)
def test_hello_with_overlapping_versions_gets_the_highest_common_one(
    agent: Agent, lowest: int, highest: int
) -> None:
    host = RawHost(agent.socket)
    assert host.greet(versions=(lowest, highest)).version == VERSION
    assert not host.call(1, pb.Request(ping=pb.Ping())).HasField("failure")
    host.close()


@pytest.mark.parametrize(("lowest", "highest"), [(VERSION + 1, 99), (1, MIN_VERSION - 1), (5, 2)])
def test_hello_without_a_common_version_gets_the_agents_range_and_nothing_else(
    agent: Agent, lowest: int, highest: int
) -> None:
    host = RawHost(agent.socket)
    welcome = host.greet(versions=(lowest, highest))
    assert (welcome.version, welcome.epoch) == (0, 7)
    assert (welcome.min_version, welcome.max_version) == (MIN_VERSION, VERSION)
    host.send(PING)
    assert host.is_silent(), "no request is executed"
    assert resync(host).version == VERSION
    host.close()


def test_hello_of_protocol_1_is_refused(agent: Agent) -> None:
    """Version 1 sent its wall clock in field 3, where later versions have their lowest version."""
    host, nonce = RawHost(agent.socket), os.urandom(16)
    host.send(TOKEN + nonce + frame(1, 0, b"\x08\x01\x10\x07\x18\x80\x80\x80\x80\x80\x80\x80\x80\x10"))
    host.skip_to(nonce)
    kind, _, payload = host.frame()
    assert (kind, pb.Welcome.FromString(payload).version) == (2, 0)
    host.close()


def test_connection_with_unknown_token_is_ignored(agent: Agent, host: RawHost) -> None:
    other = RawHost(agent.socket)
    other.send(b"not the token..." + bytes(16) + HELLO)
    assert other.is_silent()
    assert resync(other).version == VERSION, "the right token works on the same connection"
    other.close()


def test_first_whole_token_is_adopted() -> None:
    agent = Agent(build("husk-agent"), scratch_dir("agent"))
    try:
        host = RawHost(agent.socket)
        host.send(b"another ")
        host.close()  # half a token, as of a daemon that died
        host = RawHost(agent.socket)
        assert host.greet(token=b"0123456789abcdef").version == VERSION
        host.close()
        host = RawHost(agent.socket)
        host.send(TOKEN + bytes(16) + HELLO)
        assert host.is_silent()
        host.close()
    finally:
        assert agent.close() == 0


@pytest.mark.parametrize("cut", [1, 5, 12, 13, 500])
def test_token_inside_a_partial_frame_starts_a_connection(host: RawHost, cut: int) -> None:
    host.send(frame(3, 5, bytes(1000))[:cut])
    resync(host)
    assert not host.call(1, pb.Request(ping=pb.Ping())).HasField("failure")


def test_token_sent_byte_by_byte_is_found(host: RawHost) -> None:
    host.send(frame(3, 5, bytes(1000))[:600])
    nonce = os.urandom(16)
    host.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for byte in TOKEN + nonce + HELLO:
        host.send(bytes([byte]))
    host.skip_to(nonce)
    assert host.frame()[0] == 2


def test_token_after_a_partial_token_is_found(host: RawHost) -> None:
    """The search must not miss a token that follows a part of one."""
    nonce = os.urandom(16)
    host.send(frame(3, 5, bytes(100))[:50] + TOKEN[:9] + TOKEN[:15] + TOKEN + nonce + HELLO)
    host.skip_to(nonce)
    assert host.frame()[0] == 2


def test_second_of_two_preambles_is_answered_last(host: RawHost) -> None:
    first, second = os.urandom(16), os.urandom(16)
    host.send(TOKEN + first + HELLO + TOKEN + second + HELLO)
    host.skip_to(second)
    assert host.frame()[0] == 2


@pytest.mark.parametrize(
    "broken",
    [
        (5 << 20).to_bytes(4, "little") + bytes([3, 0, 0, 0]) + b"\1\0\0\0",
        frame(0, 1),
        frame(2, 1),
        frame(10, 1),
        frame(3, 0, b"x"),
        frame(3, 1, b"\xff\xff\xff"),
        frame(6, 1, bytes(65537)),
        frame(7, 1, b"abc"),
        frame(8, 1, b"x"),
        frame(9, 1, b"x"),
        frame(1, 0, pb.Hello(version=VERSION).SerializeToString()),  # a second Hello
        b"\0\0\0\0\3\1\0\0\1\0\0\0",
    ],
)
def test_invalid_frame_silences_the_agent_until_the_next_token(host: RawHost, broken: bytes) -> None:
    host.send(broken + PING)
    assert host.is_silent(0.1)
    resync(host)
    assert not host.call(1, pb.Request(ping=pb.Ping())).HasField("failure")


def test_request_before_hello_is_ignored(agent: Agent) -> None:
    host = RawHost(agent.socket)
    nonce = os.urandom(16)
    host.send(TOKEN + nonce + PING + HELLO)
    host.skip_to(nonce)
    assert host.is_silent()
    host.close()


def test_frames_of_unknown_streams_are_ignored(host: RawHost) -> None:
    host.send(frame(6, 9, b"data") + frame(7, 9, bytes(4)) + frame(8, 9) + frame(9, 9))
    assert not host.call(1, pb.Request(ping=pb.Ping())).HasField("failure")


def test_request_without_a_body_is_refused(host: RawHost) -> None:
    failure = host.call(1, pb.Request()).failure
    assert (failure.step, failure.message) == ("request", "has no body")


def test_request_with_an_empty_body_is_answered(host: RawHost) -> None:
    assert host.call(2, pb.Request(start=pb.Start())).failure.step == "start"
    assert host.call(3, pb.Request(exec=pb.Exec())).failure.errno == 3
    assert not host.call(4, pb.Request(remove=pb.Remove())).HasField("failure")


FREE = max(field.number for field in pb.Request.DESCRIPTOR.fields) + 1


@pytest.mark.parametrize("number", [FREE, 200, (1 << 29) - 1])
def test_request_of_a_newer_protocol_is_refused_with_its_number(host: RawHost, number: int) -> None:
    request = pb.Request.FromString(encode_varint(number << 3 | 2) + b"\0")
    failure = host.call(1, request).failure
    assert (failure.step, failure.errno) == ("request", errno.EOPNOTSUPP)
    assert failure.message.startswith(f"body {number} is unknown to this agent (protocol {MIN_VERSION} to")
    assert not host.call(2, pb.Request(ping=pb.Ping())).HasField("failure"), "the connection goes on"


def encode_varint(number: int) -> bytes:
    """As protobuf does: seven bits a byte, the lowest first."""
    if number < 0x80:
        return bytes([number])
    return bytes([number & 0x7F | 0x80]) + encode_varint(number >> 7)


def test_5000_requests_in_one_write_are_all_answered(host: RawHost) -> None:
    request = pb.Request(ping=pb.Ping()).SerializeToString()
    host.send(b"".join(frame(3, id, request) for id in range(1, 5001)))
    assert sorted(host.frame()[1] for _ in range(5000)) == list(range(1, 5001))


def test_request_of_one_megabyte_is_answered(agent: Agent, host: RawHost) -> None:
    paths = [f"/proc/{number}/{'x' * 200}" for number in range(5000)]
    reply = host.call(1, pb.Request(read_cgroup=pb.ReadCgroup(paths=paths)))
    assert len(reply.values.values) == 5000


def test_reply_larger_than_a_frame_becomes_a_failure(host: RawHost) -> None:
    paths = ["/bin/busybox"] * 100
    reply = host.call(1, pb.Request(read_cgroup=pb.ReadCgroup(paths=paths)))
    assert reply.failure.step == "reply"


def test_new_connection_closes_the_one_before(agent: Agent, host: RawHost) -> None:
    other = RawHost(agent.socket)
    other.greet()
    assert host.socket.recv(1) == b"", "the agent has closed it"
    other.close()


async def test_welcome_lists_running_and_exited_containers(guest: Guest) -> None:
    running = await guest.start(["sleep", "100"])
    ended = await guest.start(["sh", "-c", "exit 9"])
    await guest.exited(ended)
    welcome = await guest.connect()
    states = {each.id: each for each in welcome.containers}
    assert states[running].state == pb.ContainerState.RUNNING
    assert states[running].pid > 1
    assert states[ended].state == pb.ContainerState.EXITED
    assert (states[ended].exited.exit_code, states[ended].exited.container_id) == (9, ended)
    await guest.remove(ended)
    assert ended not in {each.id for each in (await guest.connect()).containers}


def _is_gone(path: Path) -> bool:
    return not path.exists()


async def test_start_whose_reply_was_lost_is_undone_or_listed(agent: Agent, guest: Guest) -> None:
    """The daemon died before the reply: the next one finds the container in the Welcome, or it is gone."""
    for _ in range(20):
        await guest.client.close()
        host = RawHost(agent.socket)
        host.greet()
        id = guest.name()
        request = pb.Request(start=start(id, agent.rootfs(), ["sleep", "1000"]))
        host.send(frame(3, 1, request.SerializeToString()))
        welcome = resync(host)
        host.close()
        known = {each.id for each in welcome.containers}
        await guest.connect()
        if id in known:
            assert (await guest.exec(id, ["true"]))[0] == 0
        else:
            cgroup = agent.cgroup / "husk" / id
            await eventually(partial(_is_gone, cgroup), describe="the start is undone")
        await guest.remove(id)


def test_unprivileged_agent_replies_but_starts_nothing() -> None:
    directory = scratch_dir("agent")
    directory.chmod(0o777)
    program = shutil.copy(build("husk-agent"), directory)  # the tree may be in a directory of root alone
    agent = Agent(Path(program), directory, unprivileged=True)
    try:
        host = RawHost(agent.socket)
        host.greet()
        assert host.call(1, pb.Request(start=start("c", directory, ["true"]))).HasField("failure")
        assert host.call(2, pb.Request(configure=pb.Configure(hostname="x"))).failure.errno == 1
        assert not host.call(3, pb.Request(ping=pb.Ping())).HasField("failure")
        host.close()
    finally:
        assert agent.close() == 0


def test_power_off_ends_the_agent_and_its_containers() -> None:
    agent = Agent(build("husk-agent"), scratch_dir("agent"))
    host = RawHost(agent.socket)
    host.greet()
    assert not host.call(1, pb.Request(start=start("c", agent.rootfs(), ["sleep", "9999"]))).HasField(
        "failure"
    )
    assert not host.call(2, pb.Request(power_off=pb.PowerOff())).HasField("failure")
    assert agent.process.wait(10) == 0
    agent.close()
