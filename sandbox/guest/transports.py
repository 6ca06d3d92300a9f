"""Finds the transport that an address names: `vsock.py` serves `vsock:3:1024`, and so on."""

from __future__ import annotations

import importlib
import pkgutil
import socket
from typing import cast

import sandbox.guest
from sandbox.errors import GuestUnreachable
from sandbox.guest import Transport


def find_transport(scheme: str) -> Transport:
    """Return the transport of a scheme. Raises GuestUnreachable when no file of this folder serves it."""
    if scheme in {module.name for module in pkgutil.iter_modules(sandbox.guest.__path__)}:
        module = importlib.import_module(f"sandbox.guest.{scheme}")
        if hasattr(module, "transport"):
            return cast(Transport, module.transport)
    raise GuestUnreachable(f"there is no transport {scheme!r}")


async def connect(address: str, timeout_s: float) -> socket.socket:
    """Connect to `scheme:rest`; see `Transport.connect`. Raises GuestUnreachable."""
    scheme, colon, rest = address.partition(":")
    if not colon:
        raise GuestUnreachable(f"{address!r} is not a transport address")
    return await find_transport(scheme).connect(rest, timeout_s)
