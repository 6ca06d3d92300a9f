"""Log lines of the daemon: their format, and the pod that each of them belongs to."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import IO

_pod: contextvars.ContextVar[str] = contextvars.ContextVar("pod", default="")


def set_pod_context(pod: str) -> None:
    """Set the pod that log lines of the current task name. Tasks that it starts inherit the value."""
    _pod.set(pod)


def current_pod() -> str:
    """Return the pod of the current task: an id or NAMESPACE/NAME; empty when none is set."""
    return _pod.get()


class JsonFormatter(logging.Formatter):
    """Format a record as one JSON object per line. `extra={"fields": {...}}` adds keys."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON object of `record`; an exception is its `traceback`."""
        entry = _entry(record) | {"message": record.getMessage()} | dict(_fields(record))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Format a record for people: time, level, logger, pod, message, then key=value pairs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of `record`, followed by the lines of a traceback."""
        entry = _entry(record)
        pod = f" [{entry['pod']}]" if "pod" in entry else ""
        fields = "".join(f" {key}={_quoted(value)}" for key, value in _fields(record).items())
        line = f"{entry['time']} {record.levelname:<7} {record.name}{pod}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _entry(record: logging.LogRecord) -> dict[str, object]:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    entry: dict[str, object] = {
        "time": f"{seconds}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
    }
    return entry | {"pod": current_pod()} if current_pod() else entry


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return fields


def _quoted(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if not text or set(text) & set(' "\n=') else text


def setup_logging(level: str, format: str, stream: IO[str] | None = None) -> None:
    """Log everything to `stream` (default: standard error), in place of the root logger's handlers.

    `level` is a name of `logging` in any case; `format` is "json" or "text". Libraries log from WARNING on.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("asyncio", "httpx2", "httpcore2", "qemu", "pyroute2", "grpc"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
