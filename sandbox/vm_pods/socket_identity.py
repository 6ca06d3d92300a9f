"""As whom the daemon connects to a socket of the host for a process of a guest. Pure.

The guest says which user a process has, as it does for files. It is believed as far as the container's user
could have become that one: the host's kernel would not let the container's first process, nor any child of
it, be another.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from sandbox import capabilities
from sandbox.guest.sockets import Peer
from sandbox.host.ids import IdRange, to_outside
from sandbox.host.socket_files import Identity
from sandbox.plan.values import ProcessPlan
from sandbox.spec import UserNamespace

OVERFLOW_ID = 65534
_NO_ID = -1  # no process's id
_SETUID = capabilities.mask_of(["SETUID", "SETGID"])
_OVERRIDE = capabilities.mask_of(["DAC_OVERRIDE"])


def find_identity(process: ProcessPlan, peer: Peer) -> Identity | None:
    """Return the user to connect as, in ids of the host; None: no process of the container can be it."""
    if not _can_be(process, peer):
        return None
    held = process.cap_bounding if peer.uid == 0 else process.cap_ambient
    # in a user namespace a capability counts for files of the namespace's users alone
    return Identity(peer.uid, peer.gid, peer.groups, 0 if process.uid_ranges else held & _OVERRIDE)


def _can_be(process: ProcessPlan, peer: Peer) -> bool:
    groups = {peer.gid, *peer.groups}
    if process.uid_ranges:
        if not _holds(process.uid_ranges, peer.uid):
            return False
        # groups that the namespace does not map are those that its first process was given
        if not all(_holds(process.gid_ranges, group) or group == OVERFLOW_ID for group in groups):
            return False
    if not process.no_new_privs:  # a set-user-id program of the image may make it any user
        return True
    held = process.cap_ambient if process.uid else process.cap_bounding
    if held & _SETUID == _SETUID:
        return True
    uid = _outside(process.uid_ranges, process.uid)
    own = {_outside(process.gid_ranges, group) for group in (process.gid, *process.groups)}
    return peer.uid == uid and groups <= own


def _holds(ranges: Sequence[IdRange], id: int) -> bool:
    return any(each.outside <= id < each.outside + each.length for each in ranges)


def _outside(ranges: Sequence[IdRange], id: int) -> int:
    return to_outside(ranges, id, unmapped=OVERFLOW_ID) if ranges else id


def shifted(info: os.stat_result, ids: UserNamespace | None) -> tuple[int, int]:
    """Return owner and group of a file as the mount shows them to the guest."""
    if ids is None:
        return info.st_uid, info.st_gid
    return (
        to_outside(ids.uids, info.st_uid, unmapped=OVERFLOW_ID),
        to_outside(ids.gids, info.st_gid, unmapped=OVERFLOW_ID),
    )


def may_write(info: os.stat_result, identity: Identity, ids: UserNamespace, *, listed: bool) -> bool:
    """Whether the mode lets this user connect through a mount that shifts owners (path_resolution(7)).

    The kernel decides by the real owner, which the user is not: so this decides instead. An owner or group
    that the mount does not map matches none, whatever the user's ids are. `listed`: the file has an ACL,
    whose entries are not read: then it is the owner's alone, as they may deny what the mode allows to others.
    """
    uid = to_outside(ids.uids, info.st_uid, unmapped=_NO_ID)
    gid = to_outside(ids.gids, info.st_gid, unmapped=_NO_ID)
    if identity.uid == uid:
        return bool(info.st_mode & stat.S_IWUSR)
    if listed:
        return False
    if gid == identity.gid or gid in identity.groups:
        return bool(info.st_mode & stat.S_IWGRP)
    return bool(info.st_mode & stat.S_IWOTH)
