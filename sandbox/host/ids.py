"""User and group ids: their range, and how a user namespace maps them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

# (uid_t) -1 means "leave it as it is" to chown(2) and setresuid(2), so the greatest id is the one below.
ID_MAX = 2**32 - 2


class IdRange(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`length` consecutive ids, from `inside` in a user namespace and from `outside` in its parent: one line
    of /proc/PID/uid_map (user_namespaces(7))."""

    inside: int
    outside: int
    length: int


def to_outside(ranges: Sequence[IdRange], id: int, *, unmapped: int) -> int:
    """Return what `id` of the namespace is in its parent; `unmapped` if no range holds it."""
    for each in ranges:
        if each.inside <= id < each.inside + each.length:
            return each.outside + id - each.inside
    return unmapped
