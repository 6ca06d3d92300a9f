"""eBPF programs that filter the devices of a cgroup (bpf(2), BPF_PROG_TYPE_CGROUP_DEVICE)."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH = 5, 8  # linux/bpf.h
_CGROUP_DEVICE = 15  # BPF_PROG_TYPE_CGROUP_DEVICE
_ATTACH_DEVICE = 6  # BPF_CGROUP_DEVICE
_INSTRUCTION_BYTES = 8


class _Load(ctypes.Structure):  # union bpf_attr, as BPF_PROG_LOAD takes it
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("program", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
    )


class _Attach(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("target", "program", "type", "flags"))


def load_device_filter(program: bytes) -> int:
    """Load an array of struct bpf_insn. Returns a descriptor that the caller owns.

    Needs CAP_BPF and CAP_NET_ADMIN. Raises OSError, also where the verifier rejects the program.
    """
    code, license = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"")
    count = len(program) // _INSTRUCTION_BYTES
    return _bpf(_PROG_LOAD, _Load(_CGROUP_DEVICE, count, ctypes.addressof(code), ctypes.addressof(license)))


def attach_device_filter(directory: Path, program: bytes) -> None:
    """Filter the devices of a cgroup of v2; the filter is detached with the cgroup. Raises OSError."""
    loaded = load_device_filter(program)
    try:
        target = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _bpf(_PROG_ATTACH, _Attach(target, loaded, _ATTACH_DEVICE, 0))
        finally:
            os.close(target)
    finally:
        os.close(loaded)


def _bpf(command: int, attribute: ctypes.Structure) -> int:
    number = _SYS_BPF[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.sizeof(attribute)
    result = int(libc.syscall(ctypes.c_long(number), command, ctypes.byref(attribute), size))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf: {os.strerror(code)}")
    return result
