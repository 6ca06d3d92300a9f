"""Synchronous gRPC client of the command line, over the socket of a running daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cri.server import MESSAGE_MAX


class CallFailed(Exception):
    """The daemon returned an error, or could not be reached. `details` is meant for the user."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class Client:
    """Calls methods of a service by name, with stubs made from the descriptors as the server's handlers are.

    A context manager: leaving it closes the channel. Making one does not connect yet.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        options = [
            ("grpc.max_receive_message_length", MESSAGE_MAX),
            ("grpc.enable_http_proxy", 0),
        ]
        self._channel = grpc.insecure_channel(f"unix:{socket}", options)

    def call(self, service: ServiceDescriptor, method: str, request: Message, timeout_s: float = 60) -> Any:
        """Call a unary method and return its response. Raises CallFailed, also after `timeout_s`."""
        stub = self._channel.unary_unary(*self._wire(service, method))
        try:
            return stub(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    def stream(self, service: ServiceDescriptor, method: str, request: Message) -> Iterator[Any]:
        """Call a streaming method and yield its responses. Raises CallFailed while they are read."""
        stub = self._channel.unary_stream(*self._wire(service, method))
        try:
            yield from stub(request)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    @staticmethod
    def _wire(service: ServiceDescriptor, method: str) -> tuple[str, Any, Any]:
        answer = GetMessageClass(service.methods_by_name[method].output_type)
        return f"/{service.full_name}/{method}", _serialize, answer.FromString

    def _failed(self, error: grpc.RpcError) -> CallFailed:
        code = error.code()
        details = error.details() or code.name
        if code is grpc.StatusCode.UNAVAILABLE and not self._socket.exists():
            details = f"no daemon listens on {self._socket}; start one with: husk serve"
        return CallFailed(code, details)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()


def _serialize(message: Message) -> bytes:
    """Look the method up in the message's own class; `Message.SerializeToString` is the base's."""
    return message.SerializeToString()
