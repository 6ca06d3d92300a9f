"""Writes initramfs archives in cpio's "newc" format, the same bytes for the same content.

Each member is a 110-byte header of "070701" and 13 fields of 8 hex digits, the name with its NUL, padding to
4 bytes, the data, padding to 4; a member "TRAILER!!!" ends the archive (kernel's
Documentation/driver-api/early-userspace/buffer-format.rst). The owner is root, times are 0 and inode numbers
count up, so nothing of the host gets in. Pure.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence

import msgspec


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A file, directory, link or device. `mode` includes the type, as in inode(7)."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Member:
    """Return a directory; its parents must come before it in the archive."""
    return Member(name=name, mode=stat.S_IFDIR | mode)


def file(name: str, content: bytes, mode: int = 0o644) -> Member:
    """Return a regular file."""
    return Member(name=name, mode=stat.S_IFREG | mode, content=content)


def symbolic_link(name: str, target: str) -> Member:
    """Return a symbolic link."""
    return Member(name=name, mode=stat.S_IFLNK | 0o777, content=target.encode())


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Member:
    """Return a character device."""
    return Member(name=name, mode=stat.S_IFCHR | mode, device=(major, minor))


def write_archive(members: Sequence[Member]) -> bytes:
    """Encode the members in their order, and the trailer."""
    archive = bytearray()
    for inode, member in enumerate(members, start=1):
        _append(archive, inode, member)
    _append(archive, 0, Member(name="TRAILER!!!", mode=0))
    return bytes(archive)


def _append(archive: bytearray, inode: int, member: Member) -> None:
    name = member.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(member.mode) else 1
    major, minor = member.device
    fields = (inode, member.mode, 0, 0, links, 0, len(member.content), 0, 0, major, minor, len(name), 0)
    archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name
    archive += bytes(-len(archive) % 4)
    archive += member.content
    archive += bytes(-len(archive) % 4)
