"""Whom the daemon connects as for a process of a guest, and the messages of a stream."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import capabilities
from sandbox.errors import ProtocolError
from sandbox.guest.sockets import Peer
from sandbox.host.ids import IdRange
from sandbox.host.socket_files import MESSAGE_BYTES, Identity
from sandbox.plan.values import ProcessPlan
from sandbox.spec import UserNamespace
from sandbox.vm_pods.socket_identity import OVERFLOW_ID, find_identity, may_write
from sandbox.vm_pods.socket_relay import Messages

OVERRIDE = capabilities.mask_of(["DAC_OVERRIDE"])
SETID = capabilities.mask_of(["SETUID", "SETGID"])
RANGES = (IdRange(inside=0, outside=100_000, length=1000),)
IDS = UserNamespace(uids=RANGES, gids=RANGES)

ROOT = ProcessPlan(cap_bounding=capabilities.ALL)
TIED_ROOT = ProcessPlan(no_new_privs=True, cap_bounding=OVERRIDE)
FREE_ROOT = ProcessPlan(no_new_privs=True, cap_bounding=SETID)
USER = ProcessPlan(uid=1000, gid=1000, groups=(2000,), no_new_privs=True, cap_bounding=capabilities.ALL)
FREE_USER = ProcessPlan(uid=1000, gid=1000)
AMBIENT_USER = ProcessPlan(uid=1000, gid=1000, no_new_privs=True, cap_ambient=SETID | OVERRIDE)
SPACE_ROOT = ProcessPlan(cap_bounding=capabilities.ALL, uid_ranges=RANGES, gid_ranges=RANGES)
SPACE_USER = ProcessPlan(
    uid=10, gid=10, groups=(20,), no_new_privs=True, uid_ranges=RANGES, gid_ranges=RANGES
)


@pytest.mark.parametrize(
    ("process", "uid", "gid", "groups", "expected"),
    [
        (ROOT, 0, 0, (), OVERRIDE),
        (ROOT, 33, 33, (44,), 0),
        (TIED_ROOT, 0, 0, (), OVERRIDE),
        (TIED_ROOT, 33, 0, (), None),
        (FREE_ROOT, 33, 33, (), 0),
        (USER, 1000, 1000, (2000,), 0),
        (USER, 1000, 2000, (), 0),
        (USER, 0, 0, (), None),
        (USER, 1000, 0, (), None),
        (USER, 1000, 1000, (0,), None),
        (FREE_USER, 0, 0, (), 0),
        (AMBIENT_USER, 5, 5, (), OVERRIDE),
        (SPACE_ROOT, 100_000, 100_000, (), 0),
        (SPACE_ROOT, 100_999, 100_000, (OVERFLOW_ID,), 0),
        (SPACE_ROOT, 0, 0, (), None),
        (SPACE_ROOT, 101_000, 100_000, (), None),
        (SPACE_ROOT, 100_000, 100_000, (0,), None),
        (SPACE_USER, 100_010, 100_020, (), 0),
        (SPACE_USER, 100_000, 100_010, (), None),
    ],
)
def test_identity_is_one_that_the_container_could_have(
    process: ProcessPlan, uid: int, gid: int, groups: tuple[int, ...], expected: int | None
) -> None:
    identity = find_identity(process, Peer("s", uid, gid, groups))
    assert identity == (None if expected is None else Identity(uid, gid, groups, expected))


@pytest.mark.parametrize(
    ("mode", "owner", "user", "allowed"),
    [
        (0o600, (0, 0), (100_000, 100_000), True),
        (0o600, (0, 0), (100_001, 100_000), False),
        (0o060, (0, 5), (100_001, 100_005), True),
        (0o060, (1, 5), (100_001, 100_005), False),
        (0o006, (0, 0), (100_001, 100_001), True),
        (0o660, (5000, 5000), (100_000, 100_000), False),
        (0o660, (5000, 5000), (100_000, OVERFLOW_ID), False),
        (0o660, (5000, 5000), (OVERFLOW_ID, 100_000), False),
    ],
)
def test_mode_counts_for_the_shifted_owner(
    mode: int, owner: tuple[int, int], user: tuple[int, int], allowed: bool
) -> None:
    info = os.stat_result((stat.S_IFSOCK | mode, 1, 1, 1, *owner, 0, 0, 0, 0))
    assert may_write(info, Identity(*user), IDS, listed=False) is allowed
    assert may_write(info, Identity(*user), IDS, listed=True) is (allowed and user[0] == 100_000 + owner[0])


@given(messages=st.lists(st.binary(max_size=300), max_size=20), cuts=st.lists(st.integers(1, 50)))
def test_messages_are_the_same_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(each).to_bytes(4, "little") + each for each in messages)
    parser = Messages()
    seen: list[bytes] = []
    while stream:
        size = cuts.pop() if cuts else len(stream)
        seen += parser.feed(stream[:size])
        stream = stream[size:]
    assert seen == messages


@given(data=st.binary(max_size=2000))
def test_any_bytes_are_messages_or_an_error_and_bounded(data: bytes) -> None:
    parser = Messages()
    try:
        seen = list(parser.feed(data))
    except ProtocolError:
        return
    assert sum(4 + len(each) for each in seen) <= len(data)


def test_message_that_is_too_long_is_an_error() -> None:
    parser = Messages()
    assert list(parser.feed(MESSAGE_BYTES.to_bytes(4, "little") + bytes(MESSAGE_BYTES))) == [
        bytes(MESSAGE_BYTES)
    ]
    with pytest.raises(ProtocolError):
        list(parser.feed((MESSAGE_BYTES + 1).to_bytes(4, "little")))
