"""Parsers of the kernel's accounting files, whose contents a guest may have sent.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and accounting/psi.rst, and proc(5). A guest is
not trusted: malformed text counts as absent, numbers are capped to fit the wire, lines and entries are
bounded, and no name is taken from a file unless the host knows it. The parsers raise nothing. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sandbox.spec import Value

NUMBER_MAX = 2**63 - 1  # int64 of the wire; no real number is larger
TEXT_MAX = 64 << 10  # the agent sends no more of one file
_LINES_MAX = 256
_DEVICES_MAX = 32
_AVERAGE = re.compile(rb"\d{1,3}\.\d{1,3}")
_DEVICE = re.compile(rb"\d{1,4}:\d{1,7}")
_NET_FIELDS = 16  # eight received, eight transmitted


class Pressure(Value, frozen=True, kw_only=True):
    """Share of time stalled in the last 10, 60 and 300 s in percent, and the total in microseconds."""

    avg10: float = 0
    avg60: float = 0
    avg300: float = 0
    total_us: int = 0


class Psi(Value, frozen=True, kw_only=True):
    """Pressure stall information: the time in which `some` tasks, or all of them (`full`), waited."""

    some: Pressure = Pressure()
    full: Pressure = Pressure()


class IoUsage(Value, frozen=True, kw_only=True):
    """Bytes and requests of one block device of the guest, named "major:minor"."""

    device: str
    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0


class InterfaceUsage(Value, frozen=True, kw_only=True):
    """Counters of one network interface, as the pod sees them: rx is what it received."""

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
    """Parse a number of at most 19 digits, capped to NUMBER_MAX; 0 for any other text."""
    text = text.strip()
    return min(int(text), NUMBER_MAX) if text.isdigit() and len(text) < 20 else 0


def limit(text: bytes) -> int:
    """Parse a limit; 0, which means no limit, for "max" and malformed text. A limit of 0 becomes 1."""
    return max(1, number(text)) if text.strip().isdigit() else 0


def flat_keyed(text: bytes) -> Mapping[bytes, int]:
    """Parse a file of lines "KEY VALUE" (cgroup-v2.rst, "Flat keyed")."""
    found = {}
    for line in _lines(text):
        key, _, value = line.partition(b" ")
        found[key] = number(value)
    return found


def meminfo(text: bytes) -> Mapping[bytes, int]:
    """Parse /proc/meminfo, or /proc/PID/status, to bytes by key; sizes in the file are kB."""
    found = {}
    for line in _lines(text):
        key, _, value = line.partition(b":")
        found[key] = min(number(value.removesuffix(b"kB")) * 1024, NUMBER_MAX)
    return found


def psi(text: bytes) -> Psi | None:
    """Parse a pressure file; None where the kernel does not keep it (no "some" line)."""
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
    """Parse io.stat, lines of "8:0 rbytes=1 wbytes=2 ..." ("Nested keyed"); at most 32 devices."""
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
    """Parse /proc/net/dev. Returns the interfaces of `names` that exist, in that order: lo and those that a
    container created are left out."""
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
