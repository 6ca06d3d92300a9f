"""Reads the kernel's accounting files as a guest sent them.

Sources: Documentation/admin-guide/cgroup-v2.rst, Documentation/accounting/psi.rst and proc(5). The
guest is not trusted: what has no meaning counts as absent, numbers fit the wire, lines and entries are
bounded, and only names that the host knows itself are taken from a file. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sandbox.spec import Value

NUMBER_MAX = 2**63 - 1  # beyond anything real
TEXT_MAX = 64 << 10  # what the agent sends of one file
_LINES_MAX = 256
_DEVICES_MAX = 32
_AVERAGE = re.compile(rb"\d{1,3}\.\d{1,3}")
_DEVICE = re.compile(rb"\d{1,4}:\d{1,7}")
_NET_FIELDS = 16  # eight of what came in, eight of what went out


class Pressure(Value, frozen=True, kw_only=True):
    """Share of time lost, in percent, and all of it so far."""

    avg10: float = 0
    avg60: float = 0
    avg300: float = 0
    total_us: int = 0


class Psi(Value, frozen=True, kw_only=True):
    """Pressure stall information: `some` tasks, or `full`: all of them, waited."""

    some: Pressure = Pressure()
    full: Pressure = Pressure()


class IoUsage(Value, frozen=True, kw_only=True):
    """What went to and from one block device of the guest, named "major:minor"."""

    device: str
    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0


class InterfaceUsage(Value, frozen=True, kw_only=True):
    name: str
    rx_bytes: int = 0
    rx_packets: int = 0
    rx_errors: int = 0
    rx_dropped: int = 0
    tx_bytes: int = 0
    tx_packets: int = 0
    tx_errors: int = 0
    tx_dropped: int = 0


def number(text: bytes) -> int:
    """0 for what is none."""
    text = text.strip()
    return min(int(text), NUMBER_MAX) if text.isdigit() and len(text) < 20 else 0


def limit(text: bytes) -> int:
    """A limit; 0 for "max" and what is none. (A limit of nothing at all reads as 1.)"""
    return max(1, number(text)) if text.strip().isdigit() else 0


def flat_keyed(text: bytes) -> Mapping[bytes, int]:
    """ "KEY VALUE" a line."""
    found = {}
    for line in _lines(text):
        key, _, value = line.partition(b" ")
        found[key] = number(value)
    return found


def meminfo(text: bytes) -> Mapping[bytes, int]:
    """/proc/meminfo in bytes."""
    found = {}
    for line in _lines(text):
        key, _, value = line.partition(b":")
        found[key] = min(number(value.removesuffix(b"kB")) * 1024, NUMBER_MAX)
    return found


def psi(text: bytes) -> Psi | None:
    """None where the guest's kernel does not keep it."""
    kinds = {line.partition(b" ")[0]: line for line in _lines(text)}
    if b"some" not in kinds:
        return None
    return Psi(some=_pressure(kinds[b"some"]), full=_pressure(kinds.get(b"full", b"")))


def _pressure(line: bytes) -> Pressure:
    fields = dict(_pairs(line))
    return Pressure(
        avg10=_average(fields.get(b"avg10", b"")),
        avg60=_average(fields.get(b"avg60", b"")),
        avg300=_average(fields.get(b"avg300", b"")),
        total_us=number(fields.get(b"total", b"")),
    )


def _average(text: bytes) -> float:
    return min(float(text), 100.0) if _AVERAGE.fullmatch(text) else 0.0


def io_stat(text: bytes) -> tuple[IoUsage, ...]:
    """Nested-keyed: "8:0 rbytes=1 wbytes=2 ..." a line."""
    devices: dict[bytes, IoUsage] = {}
    for line in _lines(text):
        name, _, rest = line.partition(b" ")
        if _DEVICE.fullmatch(name) and len(devices) < _DEVICES_MAX:
            fields = dict(_pairs(rest))
            devices[name] = IoUsage(
                device=name.decode(),
                read_bytes=number(fields.get(b"rbytes", b"")),
                written_bytes=number(fields.get(b"wbytes", b"")),
                reads=number(fields.get(b"rios", b"")),
                writes=number(fields.get(b"wios", b"")),
            )
    return tuple(devices.values())


def net_dev(text: bytes, names: Collection[str]) -> tuple[InterfaceUsage, ...]:
    """/proc/net/dev, in the order of `names`: others (lo, and what a container made) are left out."""
    counts = {}
    for line in _lines(text):
        name, colon, rest = line.partition(b":")
        fields = rest.split(None, _NET_FIELDS)[:_NET_FIELDS]
        if colon and len(fields) == _NET_FIELDS:
            counts[name.strip()] = [number(field) for field in fields]
    return tuple(_interface(name, counts[name.encode()]) for name in names if name.encode() in counts)


def _interface(name: str, counts: list[int]) -> InterfaceUsage:
    return InterfaceUsage(
        name=name,
        rx_bytes=counts[0],
        rx_packets=counts[1],
        rx_errors=counts[2],
        rx_dropped=counts[3],
        tx_bytes=counts[8],
        tx_packets=counts[9],
        tx_errors=counts[10],
        tx_dropped=counts[11],
    )


def _lines(text: bytes) -> list[bytes]:
    return text[:TEXT_MAX].split(b"\n", _LINES_MAX)[:_LINES_MAX]


def _pairs(text: bytes) -> list[tuple[bytes, bytes]]:
    words = (word.partition(b"=") for word in text.split(None, 16)[:16])
    return [(key, value) for key, equals, value in words if equals]
