"""Blocking functions beside the event loop, each in a thread that ends with it.

A thread that is never reused may enter a namespace and need not leave it, so no thread of the daemon
can be left in a pod's namespace. And a function that hangs (a mount, a CNI plug-in) occupies no worker
of the event loop's pool.

A thread cannot be cancelled. So `run` decides what happens when its caller is: the function is asked to
stop (`on_cancel`), the caller waits for its end (`linger_s`), and a result that has no taker is released
(`discard`).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from sandbox.host import syscalls
from sandbox.host.tasks import until_done

log = logging.getLogger(__name__)

T = TypeVar("T")


def _nothing(*_: object) -> None:
    return None


def start(function: Callable[[], T], name: str) -> Future[T]:
    """Run `function` in a new thread, which starts in the namespaces and with the context variables (pod id
    of log lines) of the calling one. Returns at once; the future holds the result or what was raised.
    `name` appears in stack dumps."""
    future: Future[T] = Future()
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(_settle, future, function), name=name, daemon=True).start()
    return future


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # the thread's edge: raised again by the future
        future.set_exception(error)


def call(function: Callable[[], T], name: str) -> T:
    """Run `function` in a new thread and block until it ends: for one that changes its thread for good, as
    unshare(2) does. Returns what it returns, and raises what it raises."""
    return start(function, name).result()


def call_in_namespace(namespace: int | Path, kind: int, function: Callable[[], T], name: str) -> T:
    """Like `call`, in a namespace (see `enter_namespace`). Also raises OSError when it cannot be entered."""

    def work() -> T:
        enter_namespace(namespace, kind)
        return function()

    return call(work, name)


def enter_namespace(namespace: int | Path, kind: int) -> None:
    """Move the calling thread into a namespace for the rest of its life.

    `namespace` is an open descriptor, or the path of a file of nsfs; `kind` is CLONE_NEWNET or CLONE_NEWNS.
    In a mount namespace the thread's root and working directory are that namespace's root. Raises OSError.
    """
    if kind & syscalls.CLONE_NEWNS:
        syscalls.unshare(syscalls.CLONE_FS)  # setns(2): refused while root and directory are shared
    if isinstance(namespace, int):
        syscalls.setns(namespace, kind, what="namespace")
        return
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.setns(descriptor, kind, what=namespace)
    finally:
        os.close(descriptor)


async def run(
    function: Callable[[], T],
    name: str,
    *,
    on_cancel: Callable[[], None] = _nothing,
    discard: Callable[[T], None] = _nothing,
    linger_s: float | None = None,
    pooled: bool = False,
) -> T:
    """Run `function` in a separate thread and await its result.

    When the caller is cancelled, `on_cancel` is called first, which may make the function end early. Then
    the caller waits until the function has ended, at most `linger_s` seconds (None: however long it takes,
    and however often it is cancelled meanwhile), and CancelledError is raised. A result that comes after
    the cancellation is passed to `discard`, in a thread, before the wait ends.
    With `pooled` the function runs in a worker of the event loop's pool: for short work that is frequent.
    Raises what `function` raises.
    """
    if pooled:
        work: Future[T] = Future()
        context = contextvars.copy_context()
        asyncio.get_running_loop().run_in_executor(None, context.run, _settle, work, function)
    else:
        work = start(function, name)
    ended = asyncio.wrap_future(work)
    try:
        # not `await ended`: only the caller's own cancellation must arrive here
        await asyncio.wait({ended})
    except asyncio.CancelledError:
        ended.add_done_callback(asyncio.Future.exception)  # retrieved: `_release` logs it
        on_cancel()
        await until_done(asyncio.wrap_future(start(lambda: _release(work, name, discard), name)), linger_s)
        raise
    return ended.result()


def _release(work: Future[T], name: str, discard: Callable[[T], None]) -> None:
    """Wait for the end of work whose caller was cancelled, and discard its result."""
    error = work.exception()
    if error is not None:
        log.debug("%s failed after its caller was cancelled: %s", name, error)
        return
    try:
        discard(work.result())
    except Exception as problem:  # the thread's edge: there is no caller left to raise it to
        log.warning("%s: its result could not be released after its caller was cancelled: %s", name, problem)
