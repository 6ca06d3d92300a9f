"""A guest of a few bytes, which a VMM runs at once.

An ELF file that QEMU enters by PVH in 32-bit mode (Xen's docs/misc/pvh.pandoc): it prints a line to
the first serial port, then prints it again and again, resets the machine, or halts.
"""

from __future__ import annotations

import struct

_LOAD = 0x100000
_TEXT = 0x1000
_PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY


def make_kernel(line: str, *, then: str = "repeat") -> bytes:
    """Return an ELF file that prints `line`. `then`: "repeat" it a few times a second, "reset" or "halt"."""
    code = _print() + {"repeat": _again(), "reset": _reset(), "halt": b"\xf4\xeb\xfd"}[then]
    text = code.replace(b"MSG!", struct.pack("<I", _LOAD + len(code))) + line.encode() + b"\n\0"
    note = struct.pack("<III", 4, 4, _PHYS32_ENTRY) + b"Xen\0" + struct.pack("<I", _LOAD)
    headers = 2
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01" + bytes(9),
        *(2, 62, 1),  # executable, x86-64, version
        *(_LOAD, 64, 0, 0),  # entry, program headers, no sections, flags
        *(64, 56, headers, 0, 0, 0),
    )
    load = _segment(1, 7, _TEXT, _LOAD, len(text))
    notes = _segment(4, 4, _TEXT - len(note), 0, len(note))
    head = header + load + notes
    return head + bytes(_TEXT - len(note) - len(head)) + note + text


def _segment(kind: int, flags: int, offset: int, address: int, size: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, size, size, 4)


def _print() -> bytes:
    # mov esi, MSG; mov dx, 0x3f8; next: lodsb; test al, al; jz end; out dx, al; jmp next; end:
    return b"\xbeMSG!\x66\xba\xf8\x03\xac\x84\xc0\x74\x03\xee\xeb\xf8"


def _again() -> bytes:
    # mov ecx, 0x2000000; loop $; jmp to the beginning
    code = _print() + b"\xb9\x00\x00\x00\x02\xe2\xfe\xeb"
    return code[len(_print()) :] + struct.pack("b", -(len(code) + 1))


def _reset() -> bytes:
    # mov dx, 0xcf9; mov al, 6; out dx, al; hlt
    return b"\x66\xba\xf9\x0c\xb0\x06\xee\xf4"
