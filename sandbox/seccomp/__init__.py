"""Seccomp: from a client's profile type to the BPF bytes that the guest's kernel loads.

    default     the RuntimeDefault profile, written as a table
    profile     a profile as values, and its JSON form (Localhost)
    compiler    profile to BPF, by libseccomp

A profile is compiled on the host, for the guest's architecture and kernel and for the container's
capabilities; the guest gets bytes. The only state is a bounded cache of compiled profiles.
"""

from __future__ import annotations

import os
import stat

from sandbox.capabilities import capability_sets
from sandbox.errors import InvalidSpec
from sandbox.seccomp.compiler import compile_profile
from sandbox.seccomp.default import default_profile
from sandbox.seccomp.profile import Filter, parse_profile
from sandbox.spec import SeccompKind, SecuritySpec

__all__ = ["Filter", "compile_profile", "default_profile", "parse_profile", "seccomp_for"]

_FIELD = "config.linux.security_context.seccomp"
_MAX_PROFILE_BYTES = 1 << 20
GUEST_KERNEL = (6, 1)


def seccomp_for(security: SecuritySpec, *, kernel: tuple[int, int] = GUEST_KERNEL) -> Filter:
    """Return a container's filter; an empty one when it is unconfined or privileged.

    `kernel` is the guest's version. Blocking: reads the file of a Localhost profile. Raises InvalidSpec
    (no such file, malformed profile), MissingProgram (no libseccomp).
    """
    requested = security.seccomp
    if security.privileged or requested.kind is SeccompKind.UNCONFINED:
        return Filter()
    capabilities = capability_sets(security).bounding
    if requested.kind is SeccompKind.RUNTIME_DEFAULT:
        return compile_profile(default_profile(), capabilities, kernel=kernel)
    return compile_profile(parse_profile(_read(requested.path), requested.path), capabilities, kernel=kernel)


def _read(path: str) -> bytes:
    """Return the profile's file, an absolute path of the node (CRI, SecurityProfile.localhost_ref)."""
    field = f"{_FIELD}.localhost_ref"
    if not path.startswith("/") or "\0" in path:
        raise InvalidSpec(field, f"{path!r} is not an absolute path", "a file of the node")
    try:
        # O_NONBLOCK: opening a FIFO must not block
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidSpec(field, f"{path!r} is not a regular file")
            content = file.read(_MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise InvalidSpec(field, f"{path!r} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_PROFILE_BYTES:
        raise InvalidSpec(field, f"{path!r} is larger than {_MAX_PROFILE_BYTES} bytes")
    return content
