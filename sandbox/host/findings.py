"""What an examination of the host found: the values that `husk doctor` prints."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec


class CheckResult(StrEnum):
    """How a check ended. Only FAIL makes `husk doctor` exit with an error."""

    OK = "ok"
    WARN = "warn"  # something is slower, or some requests are refused
    FAIL = "fail"  # pods cannot be started


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The outcome of one check, in a sentence."""

    name: str
    result: CheckResult
    detail: str
    fix: str = ""  # what to do about it, such as a package to install


@dataclass(frozen=True, slots=True)
class HostCheck:
    """One examination of the host. `run` may raise: that is a failed check."""

    name: str
    run: Callable[[], Awaitable[Finding]]


def ok(name: str, detail: str) -> Finding:
    """Return the finding of a check that passed."""
    return Finding(name=name, result=CheckResult.OK, detail=detail)


def warn(name: str, detail: str, fix: str = "") -> Finding:
    """Return the finding of a check that found a restriction."""
    return Finding(name=name, result=CheckResult.WARN, detail=detail, fix=fix)


def fail(name: str, detail: str, fix: str = "") -> Finding:
    """Return the finding of a check that failed."""
    return Finding(name=name, result=CheckResult.FAIL, detail=detail, fix=fix)


def device_check(path: Path, *, use: str, missing: Finding) -> HostCheck:
    """Check that a character device can be opened for reading and writing.

    `use` says what it is good for; `missing` is the finding, and its name the check's, where it does not
    exist. A device that exists and cannot be opened is a warning.
    """
    name = missing.name

    def examine() -> Finding:
        if not path.is_char_device():
            return missing
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return warn(name, f"{path} cannot be opened: {error.strerror}", "run it with sudo")
        return ok(name, f"{path}: {use}")

    async def run() -> Finding:
        return await asyncio.to_thread(examine)

    return HostCheck(name, run)
