"""Around every call: parse the request, time and count the call, log it once, convert its error to a status.

No other code logs a call's failure or knows a status code. Requests are parsed here rather than by gRPC,
which answers an unparsable request with INTERNAL and logs a traceback.
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
Response = Any  # a message of its output type, or an encoded one
Context = grpc.aio.ServicerContext[Any, Any]
Parse = Callable[[bytes], Request]  # raises DecodeError
Unary = Callable[[Request], Awaitable[Response]]
Stream = Callable[[Request], AsyncIterator[Response]]

# Rpcs that change nothing, and that a kubelet calls all the time: logged at DEBUG.
_READ_PREFIXES = ("List", "Stream")
_READ_SUFFIXES = ("Status", "Stats", "Info", "Config", "Metrics", "Descriptors")
_WRITES = frozenset({"UpdateRuntimeConfig"})


def is_read_only(method: str) -> bool:
    """Whether an rpc, by its name, changes nothing."""
    reads = method == "Version" or method.startswith(_READ_PREFIXES) or method.endswith(_READ_SUFFIXES)
    return reads and method not in _WRITES


class Interceptor:
    """Wraps the implementations of rpcs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def unary(
        self, method: str, parse: Parse, call: Unary
    ) -> Callable[[bytes, Context], Awaitable[Response]]:
        """Wrap a unary rpc; `parse` reads its request."""

        async def served(data: bytes, context: Context) -> Response:
            running = self._begin(method)
            try:
                response = await call(_parse_request(parse, data))
            except asyncio.CancelledError:
                running.cancelled(context)
                raise
            except Exception as error:
                await context.abort(*running.failed(error))
            running.succeeded()
            return response

        return served

    def stream(
        self, method: str, parse: Parse, call: Stream
    ) -> Callable[[bytes, Context], AsyncIterator[Response]]:
        """Wrap a server-streaming rpc; `parse` reads its request."""

        async def served(data: bytes, context: Context) -> AsyncIterator[Response]:
            running = self._begin(method)
            try:
                async for response in call(_parse_request(parse, data)):
                    yield response
            except (asyncio.CancelledError, GeneratorExit):
                running.cancelled(context)
                raise
            except Exception as error:
                await context.abort(*running.failed(error))
            running.succeeded()

        return served

    def _begin(self, method: str) -> _Call:
        self._metrics.call_begun()
        return _Call(method, self._metrics)


class _Call:
    """A running call, until one of its three methods ends it."""

    def __init__(self, method: str, metrics: Metrics) -> None:
        self._method = method
        self._metrics = metrics
        self._began = time.monotonic()

    def succeeded(self) -> None:
        self._end("OK", logging.DEBUG if is_read_only(self._method) else logging.INFO)

    def cancelled(self, context: Context) -> None:
        """The client cancelled, or its deadline passed; gRPC sends the status in both cases."""
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
        return logging.DEBUG if is_read_only(self._method) else logging.INFO

    def _end(self, code: str, level: int, **fields: object) -> None:
        seconds = time.monotonic() - self._began
        self._metrics.call_ended(self._method, code, seconds)
        log.log(level, self._method, extra={"fields": {"code": code, "seconds": seconds, **fields}})


def _parse_request(parse: Parse, data: bytes) -> Request:
    """Parse the request and set the pod of the call's log lines. Raises InvalidSpec."""
    try:
        request = parse(data)
    except DecodeError as error:
        raise InvalidSpec("request", f"cannot be parsed: {error}", "a message of the CRI v1") from error
    set_pod_context(_pod_of(request))
    return request


def _pod_of(request: Request) -> str:
    """Return the pod that a request names, for the log; services replace it with the pod that they find."""
    pod_id = getattr(request, "pod_sandbox_id", "")
    if pod_id:
        return str(pod_id)[:13]
    metadata = getattr(getattr(request, "config", None), "metadata", None)
    if getattr(metadata, "namespace", ""):
        return f"{metadata.namespace}/{metadata.name}"  # type: ignore[union-attr]
    return ""
