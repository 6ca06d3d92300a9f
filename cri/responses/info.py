"""The `info` map of verbose responses."""

from __future__ import annotations

import msgspec


def info_json(value: object) -> str:
    """Encode `value` as JSON; what msgspec does not know is written as its `str`."""
    return msgspec.json.encode(value, enc_hook=str).decode()
