"""What can be said to an agent of any protocol version, one that Husk does not speak included. Pure.

A pod whose agent has no version in common with the daemon cannot be used any more, but it is ended in order:
its containers get their stop signals, and their logs and exit codes arrive. These messages suffice for that:

    Hello, Welcome, ContainerState, Exited, OpenLog, LogOpened, Signal, Remove

They have kept their fields since version 1, and the file being append-only keeps them from version 2 on. In
version 1 only the numbers in `Request` differed, and Hello had no range of versions.
"""

from __future__ import annotations

from collections.abc import Mapping

from sandbox.errors import GuestUnreachable
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.frames import MIN_VERSION

# by protocol version: the requests that every version has, and their numbers in `Request`
_NUMBERS_1: Mapping[str, int] = {"signal": 4, "remove": 5, "open_log": 8}
COMMON_REQUESTS = frozenset(_NUMBERS_1)
_BYTES = 2  # wire type of a nested message


def nearest(agent: tuple[int, int]) -> int:
    """Return the version out of an agent's range that is nearest to ours, which are outside of it."""
    lowest, highest = agent
    return highest if highest < MIN_VERSION else lowest


def hello(version: int, epoch: int) -> pb.Hello:
    """Return a Hello that speaks this version alone. Without a time: the guest's clock stays as it is."""
    return pb.Hello(version=version, epoch=epoch, min_version=0 if version == 1 else version)


def encode_request(request: pb.Request, version: int) -> bytes:
    """Encode one of the COMMON_REQUESTS for an agent of this version. Raises GuestUnreachable for others."""
    body = request.WhichOneof("body")
    if body not in COMMON_REQUESTS:
        raise GuestUnreachable(f"the agent speaks protocol version {version}: {body} cannot be requested")
    if version > 1:
        return request.SerializeToString()
    content: bytes = getattr(request, body).SerializeToString()
    return bytes([_NUMBERS_1[body] << 3 | _BYTES]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
