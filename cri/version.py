"""The version of Husk, as installed."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Of the installed package; "unknown" when it runs from a tree that was never installed."""
    try:
        return metadata.version("husk")
    except metadata.PackageNotFoundError:
        return "unknown"
