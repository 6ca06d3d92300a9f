"""The edge of every call: read it, time it, count it, log it once, turn its error into a status.

Nothing behind it logs a call's failure or knows a status code. Requests are parsed here, not by gRPC,
whose answer to bytes that are no message is INTERNAL, with a traceback in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cri.errors import CLIENT_CODES, Failure, failure_of
from cri.log_format import set_pod_context
from cri.metrics import Metrics
from sandbox.errors import InvalidSpec

log = logging.getLogger("cri")

Request = Any  # a message of the method's input type
Answer = Any  # a message of its output type, or the bytes of one
Context = grpc.aio.ServicerContext[Any, Any]
Read = Callable[[bytes], Request]  # raises DecodeError
Unary = Callable[[Request], Awaitable[Answer]]
Stream = Callable[[Request], AsyncIterator[Answer]]

# Asked all day long by a kubelet, and they change nothing.
_QUIET_BEGINNINGS = ("List", "Stream")
_QUIET_ENDINGS = ("Status", "Stats", "Info", "Config", "Metrics", "Descriptors")
_LOUD = frozenset({"UpdateRuntimeConfig"})


def is_quiet(method: str) -> bool:
    reads = method == "Version" or method.startswith(_QUIET_BEGINNINGS) or method.endswith(_QUIET_ENDINGS)
    return reads and method not in _LOUD


class Interceptor:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def unary(self, method: str, read: Read, call: Unary) -> Callable[[bytes, Context], Awaitable[Answer]]:
        async def served(data: bytes, context: Context) -> Answer:
            visit = self._begin(method)
            try:
                answer = await call(_request(read, data))
            except asyncio.CancelledError:
                visit.left(context)
                raise
            except Exception as error:
                await context.abort(*visit.failed(error))
            visit.done()
            return answer

        return served

    def stream(
        self, method: str, read: Read, call: Stream
    ) -> Callable[[bytes, Context], AsyncIterator[Answer]]:
        async def served(data: bytes, context: Context) -> AsyncIterator[Answer]:
            visit = self._begin(method)
            try:
                async for answer in call(_request(read, data)):
                    yield answer
            except (asyncio.CancelledError, GeneratorExit):
                visit.left(context)
                raise
            except Exception as error:
                await context.abort(*visit.failed(error))
            visit.done()

        return served

    def _begin(self, method: str) -> _Call:
        self._metrics.call_begun()
        return _Call(method, self._metrics)


class _Call:
    """One call under way."""

    def __init__(self, method: str, metrics: Metrics) -> None:
        self._method = method
        self._metrics = metrics
        self._began = time.monotonic()

    def done(self) -> None:
        self._end("OK", logging.DEBUG if is_quiet(self._method) else logging.INFO)

    def left(self, context: Context) -> None:
        """The client cancelled, or its deadline passed: it is told so by gRPC itself."""
        remaining = context.time_remaining()
        late = remaining is not None and remaining <= 0
        self._end("DEADLINE_EXCEEDED" if late else "CANCELLED", logging.INFO)

    def failed(self, error: Exception) -> tuple[grpc.StatusCode, str]:
        failure = failure_of(error)
        self._end(failure.code.name, self._level(failure), error=failure.full)
        if not failure.expected:
            log.debug("%s: %s", self._method, failure.full, exc_info=error)
        return failure.code, failure.message

    def _level(self, failure: Failure) -> int:
        if failure.code not in CLIENT_CODES:
            return logging.ERROR
        return logging.DEBUG if is_quiet(self._method) else logging.INFO

    def _end(self, code: str, level: int, **fields: object) -> None:
        seconds = time.monotonic() - self._began
        self._metrics.call_ended(self._method, code, seconds)
        log.log(level, self._method, extra={"fields": {"code": code, "seconds": seconds, **fields}})


def _request(read: Read, data: bytes) -> Request:
    """Raises InvalidSpec."""
    try:
        request = read(data)
    except DecodeError as error:
        raise InvalidSpec("request", f"is no such message: {error}", "a message of the CRI v1") from error
    set_pod_context(_pod_of(request))
    return request


def _pod_of(request: Request) -> str:
    """What a request itself says about its pod, for the log; services may know better."""
    pod_id = getattr(request, "pod_sandbox_id", "")
    if pod_id:
        return str(pod_id)[:13]
    metadata = getattr(getattr(request, "config", None), "metadata", None)
    if getattr(metadata, "namespace", ""):
        return f"{metadata.namespace}/{metadata.name}"  # type: ignore[union-attr]
    return ""
