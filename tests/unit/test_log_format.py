"""Log lines: their format, and the pod that they name."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from cri.log_format import set_pod_context, setup_logging


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(format: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    setup_logging(level, format, stream)
    return stream


def test_text_line_has_level_logger_message_and_fields() -> None:
    stream = written("text")
    logging.getLogger("cri").info(
        "RunPodSandbox", extra={"fields": {"code": "OK", "seconds": 1.25, "why": "a b"}}
    )
    line = stream.getvalue()
    assert line.endswith('INFO    cri: RunPodSandbox code=OK seconds=1.250 why="a b"\n')
    assert line[10] == "T"


def test_json_line_has_fields_and_traceback() -> None:
    stream = written("json")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("x").exception("it %s", "broke", extra={"fields": {"phase": "vm"}})
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["logger"], entry["message"], entry["phase"]) == (
        "error",
        "x",
        "it broke",
        "vm",
    )
    assert "ValueError: bad" in entry["traceback"]


def test_text_line_quotes_line_breaks_of_fields() -> None:
    stream = written("text")
    logging.getLogger("x").info("failed", extra={"fields": {"error": "a\nb"}})
    assert stream.getvalue().count("\n") == 1


async def test_pod_context_is_inherited_by_tasks() -> None:
    stream = written("json")
    log = logging.getLogger("x")

    async def call(pod: str) -> None:
        set_pod_context(pod)
        await asyncio.sleep(0)
        await asyncio.create_task(child())

    async def child() -> None:
        log.info("here")

    await asyncio.gather(asyncio.create_task(call("one")), asyncio.create_task(call("two")))
    log.info("outside")
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert sorted(entry["pod"] for entry in entries if entry["message"] == "here") == ["one", "two"]
    assert "pod" not in entries[-1]


def test_lower_levels_and_libraries_are_not_logged() -> None:
    stream = written("text", "warning")
    logging.getLogger("cri").info("quiet")
    logging.getLogger("httpx2").info("library")
    assert stream.getvalue() == ""
