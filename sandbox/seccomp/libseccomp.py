"""The part of libseccomp (Debian: libseccomp2) that turns rules into BPF, through ctypes.

A `Context` owns one libseccomp filter and frees it. seccomp_init(3), seccomp_rule_add(3),
seccomp_export_bpf(3).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from types import TracebackType
from typing import Self

from sandbox.errors import MissingProgram, SandboxError

CompareTriple = tuple[int, int, int, int]  # argument, operator, two data

LIBRARY = "libseccomp.so.2"
_ATTR_OPTIMIZE = 8  # SCMP_FLTATR_CTL_OPTIMIZE
_BINARY_TREE = 2
_NO_SUCH_CALL = -1  # __NR_SCMP_ERROR
_API_LEVEL = 6  # of libseccomp 2.5: all that is used here, whatever the host's kernel supports


class FilterFailed(SandboxError):
    """A call of libseccomp failed; `code` is an errno."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: {os.strerror(code)}")
        self.call = call
        self.code = code


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


@cache
def _library() -> ctypes.CDLL:
    """Load the library. Raises MissingProgram."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise MissingProgram(LIBRARY, "apt-get install libseccomp2") from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.restype = None
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    for name in ("seccomp_arch_add", "seccomp_arch_remove", "seccomp_arch_exist"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Compare),
    ]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_syscall_resolve_name_arch.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_api_set(ctypes.c_uint(_API_LEVEL))  # an older library keeps its lower level
    return library


def resolve(name: str, architecture: int) -> int:
    """Return the call's number on this architecture; negative: it has none. Raises MissingProgram."""
    return int(_library().seccomp_syscall_resolve_name_arch(architecture, name.encode()))


class Context:
    """A filter being built, as a context manager that frees it.

    Creating one raises MissingProgram; every method raises FilterFailed.
    """

    def __init__(self, default_action: int) -> None:
        self._library = _library()
        self._handle: int | None = self._library.seccomp_init(default_action)
        if self._handle is None:
            raise FilterFailed("seccomp_init", 22)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._library.seccomp_release(self._handle)
            self._handle = None

    def use_architectures(self, tokens: Sequence[int]) -> None:
        """Apply the filter to these architectures alone; a new one applies to the host's."""
        for token in tokens:
            if self._library.seccomp_arch_exist(self._handle, token) != 0:
                _check("seccomp_arch_add", self._library.seccomp_arch_add(self._handle, token))
        native = self._library.seccomp_arch_native() & 0xFFFF_FFFF
        if native not in tokens:
            _check("seccomp_arch_remove", self._library.seccomp_arch_remove(self._handle, native))

    def sort_as_tree(self) -> None:
        """Find calls by binary search instead of in a list; no effect before libseccomp 2.5."""
        self._library.seccomp_attr_set(self._handle, _ATTR_OPTIMIZE, _BINARY_TREE)

    def add(self, name: str, action: int, compares: Sequence[CompareTriple]) -> None:
        """Add a rule on every architecture that has the call.

        A name that libseccomp does not know is skipped, as OCI runtimes do: a newer kernel may have it.
        """
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number == _NO_SUCH_CALL:
            return
        array = (_Compare * len(compares))(*(_Compare(*each) for each in compares))
        code = self._library.seccomp_rule_add_array(self._handle, action, number, len(compares), array)
        _check(f"seccomp_rule_add({name})", code)

    def export(self) -> bytes:
        """Return the filter as an array of struct sock_filter."""
        file = os.memfd_create("husk-seccomp", os.MFD_CLOEXEC)
        try:
            _check("seccomp_export_bpf", self._library.seccomp_export_bpf(self._handle, file))
            size = os.lseek(file, 0, os.SEEK_END)
            return os.pread(file, size, 0)
        finally:
            os.close(file)


def _check(call: str, code: int) -> None:
    if code != 0:
        raise FilterFailed(call, -code)
