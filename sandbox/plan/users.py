"""The ids of a container's processes: numbers, or names from the image's passwd and group files. Pure.

Both files come from an image and are not trusted: malformed lines are skipped, and the others yield
nothing but ids and a home directory. passwd(5), group(5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.errors import InvalidSpec
from sandbox.host.ids import ID_MAX
from sandbox.spec import GroupsPolicy, SecuritySpec

_CONTEXT = "config.linux.security_context"
_IMAGE = "the image's User"
_MAX_FILE_BYTES = 4 << 20
_MAX_LINE_BYTES = 1 << 20  # groups may list thousands of members


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedUser:
    """The ids of a process. `groups` is `gid`, then the others in ascending order."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = (0,)
    home: str = "/"


@dataclass(frozen=True, slots=True)
class _Account:
    name: bytes
    uid: int
    gid: int
    home: bytes


@dataclass(frozen=True, slots=True)
class _UserRequest:
    """A user and perhaps a group, each a number or a name, and the fields that named them."""

    user: str
    user_field: str
    group: str
    group_field: str


def resolve_user(security: SecuritySpec, image_user: str, *, passwd: bytes, group: bytes) -> ResolvedUser:
    """Return the ids: of run_as_user, else of run_as_username, else of the image's User, else root's.

    `passwd` and `group` are the image's files. A number need not be in passwd; its group is then 0. Merge
    adds the groups that /etc/group gives the user, Strict does not (CRI, SupplementalGroupsPolicy).
    Raises InvalidSpec with the field.
    """
    request = _requested(security, image_user)
    account = _account(request, passwd)
    gid = _gid(request, group) if request.group else account.gid
    others = {
        _checked_id(number, f"{_CONTEXT}.supplemental_groups[{index}]")
        for index, number in enumerate(security.supplemental_groups)
    }
    if security.groups_policy is GroupsPolicy.MERGE and account.name:
        others |= {number for _, number, members in _groups(group) if account.name in members}
    return ResolvedUser(
        uid=account.uid, gid=gid, groups=(gid, *sorted(others - {gid})), home=_home(account.home)
    )


def image_user(user: str) -> tuple[int | None, str]:
    """Split an image's User into Image.uid and Image.username (CRI, message Image).

    "1003:1003" is (1003, ""), "www-data:x" is (None, "www-data"), "" is (None, "").
    """
    name = user.partition(":")[0]
    if _is_number(name) and int(name) <= ID_MAX:
        return int(name), ""
    return None, name


def _requested(security: SecuritySpec, from_image: str) -> _UserRequest:
    uid, gid = security.run_as_user, security.run_as_group
    if uid is not None and security.run_as_username:
        raise InvalidSpec(f"{_CONTEXT}.run_as_username", "is given together with run_as_user", "one of them")
    if gid is not None and uid is None and not security.run_as_username:
        raise InvalidSpec(
            f"{_CONTEXT}.run_as_group", "is given without a user", "run_as_user or run_as_username as well"
        )
    group_field = f"{_CONTEXT}.run_as_group"
    group = "" if gid is None else str(_checked_id(gid, group_field))
    if uid is not None:
        field = f"{_CONTEXT}.run_as_user"
        return _UserRequest(str(_checked_id(uid, field)), field, group, group_field)
    if security.run_as_username:
        return _UserRequest(security.run_as_username, f"{_CONTEXT}.run_as_username", group, group_field)
    user, _, image_group = from_image.partition(":")
    return _UserRequest(user or "0", _IMAGE, image_group, _IMAGE)


def _account(request: _UserRequest, passwd: bytes) -> _Account:
    if _is_number(request.user):
        uid = _checked_id(int(request.user), request.user_field)
        known = next((each for each in _accounts(passwd) if each.uid == uid), None)
        return known or _Account(b"", uid, 0, b"")
    name = request.user.encode("utf-8", "surrogateescape")
    found = next((each for each in _accounts(passwd) if each.name == name), None)
    if found is None:
        raise InvalidSpec(
            request.user_field,
            f"no user {request.user!r} in the image",
            "a number or a name in its /etc/passwd",
        )
    return found


def _gid(request: _UserRequest, group: bytes) -> int:
    if _is_number(request.group):
        return _checked_id(int(request.group), request.group_field)
    name = request.group.encode("utf-8", "surrogateescape")
    for known, number, _ in _groups(group):
        if known == name:
            return number
    raise InvalidSpec(
        request.group_field,
        f"no group {request.group!r} in the image",
        "a number or a name in its /etc/group",
    )


def _accounts(passwd: bytes) -> Iterator[_Account]:
    for fields in _lines(passwd):
        if len(fields) < 4:
            continue
        uid, gid = _number(fields[2]), _number(fields[3])
        if fields[0] and uid is not None and gid is not None:
            yield _Account(fields[0], uid, gid, fields[5] if len(fields) > 5 else b"")


def _groups(group: bytes) -> Iterator[tuple[bytes, int, frozenset[bytes]]]:
    for fields in _lines(group):
        if len(fields) < 3:
            continue
        number = _number(fields[2])
        if fields[0] and number is not None:
            members = fields[3].split(b",") if len(fields) > 3 else []
            yield fields[0], number, frozenset(member.strip() for member in members)


def _lines(content: bytes) -> Iterator[list[bytes]]:
    for line in content[:_MAX_FILE_BYTES].split(b"\n"):
        if len(line) <= _MAX_LINE_BYTES:
            yield line.strip().split(b":")


def _number(field: bytes) -> int | None:
    # isdigit() of bytes is ASCII only; eleven digits cannot be an id
    if field.isdigit() and len(field) <= 10 and int(field) <= ID_MAX:
        return int(field)
    return None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20


def _checked_id(number: int, field: str) -> int:
    if not 0 <= number <= ID_MAX:
        raise InvalidSpec(field, f"{number} is out of range", f"0 to {ID_MAX}")
    return number


def _home(field: bytes) -> str:
    """Return an absolute path in UTF-8, else the root: it becomes an environment variable."""
    try:
        home = field.decode()
    except UnicodeDecodeError:
        return "/"
    return home if home.startswith("/") and "\0" not in home else "/"
