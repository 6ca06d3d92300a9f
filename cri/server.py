"""The gRPC server on its unix socket.

Handlers are built from the descriptors of cri/proto. A service is a list of objects with async methods named
like the rpcs (async generators for the streaming ones); an rpc that none of them has answers UNIMPLEMENTED.
The socket has mode 0600, as access to it amounts to root on the node.

A crash leaves the socket file in place; the next start removes it if no process answers on it.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from cri.errors import NotImplementedRpc
from cri.interceptor import Context, Interceptor, Request, Response

MESSAGE_MAX = 16 << 20  # bytes; the limit of every client of the CRI, in both directions
CONNECT_TIMEOUT_S = 1.0
# Calls in flight, streams included; more get RESOURCE_EXHAUSTED at once. A kubelet has a few per pod that it
# starts or stops; without a limit a client in a loop would fill the memory.
CALLS_MAX = 2048


class SocketTaken(Exception):
    """Another daemon answers on the socket, or its path is not a socket."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Service:
    """A service and the objects that implement it."""

    descriptor: ServiceDescriptor
    parts: Sequence[object]  # the first one with a method of the rpc's name serves it


class Server:
    """Serves on one socket. Creating it has no effect on the host."""

    def __init__(self, path: Path, services: Sequence[Service], interceptor: Interceptor) -> None:
        self._path = path
        self._handlers = [_handlers(service, interceptor) for service in services]
        self._server: grpc.aio.Server | None = None

    def check(self) -> None:
        """Create the socket's directory, and remove a stale socket. Raises SocketTaken, OSError."""
        self._path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        remove_stale(self._path)

    async def start(self) -> None:
        """Create the socket and serve. Raises SocketTaken, OSError."""
        self.check()
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=CALLS_MAX,
            options=(
                ("grpc.max_receive_message_length", MESSAGE_MAX),
                ("grpc.max_send_message_length", MESSAGE_MAX),
            ),
        )
        self._server.add_generic_rpc_handlers(self._handlers)
        with _umask(0o177):  # created with its final mode, so it is never open to other users
            self._server.add_insecure_port(f"unix:{self._path}")
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s` seconds, then cancel them. Idempotent."""
        if self._server is None:
            return
        await self._server.stop(grace_s)
        self._server = None
        self._path.unlink(missing_ok=True)


def remove_stale(path: Path) -> None:
    """Remove the socket that a killed daemon left. Nothing if there is none. Raises SocketTaken."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketTaken(path, "exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise SocketTaken(path, f"cannot connect: {error}") from error
    raise SocketTaken(path, "another daemon answers there; stop it, or choose another --socket")


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# ------------------------------------------------------------------------------------ handlers


def _handlers(service: Service, interceptor: Interceptor) -> grpc.GenericRpcHandler:
    methods = {
        method.name: _handler(method, service.parts, interceptor) for method in service.descriptor.methods
    }
    return grpc.method_handlers_generic_handler(service.descriptor.full_name, methods)


def _handler(
    method: MethodDescriptor, parts: Sequence[object], interceptor: Interceptor
) -> grpc.RpcMethodHandler[Any, Any]:
    name = method.name
    call = next((getattr(part, name) for part in parts if hasattr(part, name)), None)
    make: Callable[..., grpc.RpcMethodHandler[Any, Any]]
    behaviour: Callable[[bytes, Context], Any]
    parse = GetMessageClass(method.input_type).FromString
    if method.server_streaming:
        behaviour = interceptor.stream(name, parse, call or _not_implemented_stream(name))
        make = grpc.unary_stream_rpc_method_handler
    else:
        behaviour = interceptor.unary(name, parse, call or _not_implemented(name))
        make = grpc.unary_unary_rpc_method_handler
    return make(behaviour, response_serializer=_serialize)


def _serialize(response: Response) -> bytes:
    """Encode a response; lists are encoded already (see `cri.responses.list_cache`)."""
    return response if isinstance(response, bytes) else response.SerializeToString()


def _not_implemented(name: str) -> Callable[[Request], Any]:
    async def refuse(request: Request) -> Response:
        raise NotImplementedRpc(name)

    return refuse


def _not_implemented_stream(name: str) -> Callable[[Request], AsyncIterator[Response]]:
    async def refuse(request: Request) -> AsyncIterator[Response]:
        nothing: Sequence[Response] = ()
        for response in nothing:  # makes it an async generator
            yield response
        raise NotImplementedRpc(name)

    return refuse
