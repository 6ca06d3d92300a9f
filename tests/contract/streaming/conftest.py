from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvloop

from cri.streaming.server import StreamingOptions, StreamingServer
from cri.streaming.tokens import Tokens
from tests.contract.streaming.site import Site
from tests.fakes.streaming import FakeBackend


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """Run every test of this folder on both event loops."""
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    now = [0.0]
    backend = FakeBackend()
    server = StreamingServer(backend, StreamingOptions("127.0.0.1", 0, 3600), Tokens(lambda: now[0]))
    await server.start()
    yield Site(server, backend, now)
    await server.stop()
    for task in backend.tasks:
        task.cancel()
    await asyncio.gather(*backend.tasks, return_exceptions=True)
