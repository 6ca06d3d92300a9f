"""Ids of a process: every form of a user, and files that an attacker wrote."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import InvalidSpec
from sandbox.host.ids import ID_MAX
from sandbox.plan.users import ResolvedUser, image_user, resolve_user
from sandbox.spec import GroupsPolicy, SecuritySpec

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# a comment, then malformed lines
+::::::
broken
bad:x:minus:0::/:
huge:x:99999999999:0::/:
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
short:x:70:71
relative:x:72:72::home:
latin:x:73:73::/caf\xe9:
app:x:1000:1000:App:/home/app:/bin/sh
"""
GROUP = b"""root:x:0:
www-data:x:33:
staff:x:50:app,www-data
none
late:x:50000: app
wheel:x:10:root
odd:x:ten:app
"""


def resolve(image: str = "", **security: object) -> ResolvedUser:
    return resolve_user(SecuritySpec(**security), image, passwd=PASSWD, group=GROUP)  # type: ignore[arg-type]


def test_user_without_name_is_root() -> None:
    assert resolve() == ResolvedUser(uid=0, gid=0, groups=(0, 10), home="/root")


@pytest.mark.parametrize(
    ("image", "uid", "gid", "groups"),
    [
        ("app", 1000, 1000, (1000, 50, 50000)),
        ("1000", 1000, 1000, (1000, 50, 50000)),
        ("app:staff", 1000, 50, (50, 50000)),
        ("app:4", 1000, 4, (4, 50, 50000)),
        ("1003:1003", 1003, 1003, (1003,)),
        ("1003:www-data", 1003, 33, (33,)),
        ("1003", 1003, 0, (0,)),
        ("short", 70, 71, (71,)),
        (":staff", 0, 50, (50, 10)),
    ],
)
def test_image_user_in_every_form_is_resolved(
    image: str, uid: int, gid: int, groups: tuple[int, ...]
) -> None:
    user = resolve(image)
    assert (user.uid, user.gid, user.groups) == (uid, gid, groups)


def test_user_of_client_overrides_the_image() -> None:
    assert resolve("app", run_as_user=33).home == "/var/www"
    assert resolve("app", run_as_username="www-data").uid == 33
    assert resolve("app:staff", run_as_user=33, run_as_group=7).gid == 7


def test_groups_of_image_are_added_by_merge_and_not_by_strict() -> None:
    assert resolve(run_as_user=1000, supplemental_groups=(1234,)).groups == (1000, 50, 1234, 50000)
    strict = resolve(run_as_user=1000, supplemental_groups=(1234,), groups_policy=GroupsPolicy.STRICT)
    assert strict.groups == (1000, 1234)


@pytest.mark.parametrize(
    ("name", "home"), [("relative", "/"), ("latin", "/"), ("short", "/"), ("app", "/home/app")]
)
def test_home_that_is_not_an_absolute_path_is_the_root(name: str, home: str) -> None:
    assert resolve(name).home == home


@pytest.mark.parametrize(
    ("image", "security", "field"),
    [
        ("", {"run_as_group": 5}, "run_as_group"),
        ("app", {"run_as_group": 5}, "run_as_group"),
        ("", {"run_as_user": 1, "run_as_username": "app"}, "run_as_username"),
        ("", {"run_as_username": "ghost"}, "run_as_username"),
        ("", {"run_as_username": "bad"}, "run_as_username"),
        ("", {"run_as_username": "huge"}, "run_as_username"),
        ("", {"run_as_user": -1}, "run_as_user"),
        ("", {"run_as_user": ID_MAX + 1}, "run_as_user"),
        ("", {"run_as_user": 1, "run_as_group": 1 << 40}, "run_as_group"),
        ("", {"supplemental_groups": (4, -4)}, "supplemental_groups[1]"),
        ("ghost", {}, "the image's User"),
        ("app:ghosts", {}, "the image's User"),
        (str(1 << 40), {}, "the image's User"),
    ],
)
def test_user_that_cannot_be_resolved_is_rejected_with_its_field(
    image: str, security: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        resolve(image, **security)
    assert caught.value.field.endswith(field)
    if "ghost" in str(caught.value):
        assert "/etc/" in caught.value.accepted


@pytest.mark.parametrize(
    ("user", "answer"),
    [
        ("1003:1003", (1003, "")),
        ("www-data:x", (None, "www-data")),
        ("www-data", (None, "www-data")),
        ("0", (0, "")),
        ("", (None, "")),
    ],
)
def test_image_user_is_reported_as_id_or_name(user: str, answer: tuple[int | None, str]) -> None:
    assert image_user(user) == answer


@given(passwd=st.binary(), group=st.binary(), user=st.text(), uid=st.integers(0, ID_MAX))
def test_arbitrary_files_and_names_are_resolved_or_rejected(
    passwd: bytes, group: bytes, user: str, uid: int
) -> None:
    found = resolve_user(SecuritySpec(run_as_user=uid), user, passwd=passwd, group=group)
    assert found.uid == uid
    try:
        found = resolve_user(SecuritySpec(), user, passwd=passwd, group=group)
    except InvalidSpec:
        return
    assert 0 <= found.uid <= ID_MAX
    assert found.groups[0] == found.gid
    image_user(user)


line = st.lists(
    st.sampled_from([b"app", b"", b"0", b"7", b"x", b"4294967295", b"a,app,b", b"\xff"]), max_size=8
).map(b":".join)


@given(lines=st.lists(line))
def test_plausible_lines_yield_valid_ids_alone(lines: list[bytes]) -> None:
    content = b"\n".join([*lines, b"app:x:5:6::/app:"])
    user = resolve_user(SecuritySpec(run_as_username="app"), "", passwd=content, group=content)
    assert all(0 <= number <= ID_MAX for number in (user.uid, *user.groups))


def test_huge_file_is_read_up_to_its_bound() -> None:
    content = b"a:x:1:1::/:\n" * 400_000 + b"app:x:5:6::/app:\n"
    with pytest.raises(InvalidSpec):  # beyond the bound, so not found rather than endless
        resolve_user(SecuritySpec(run_as_username="app"), "", passwd=content, group=b"")
