"""Agents for the tests of this folder: as released, and with AddressSanitizer and UBSan."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.kit.agent import Agent, Guest, build
from tests.kit.scratch import scratch_dir


@pytest.fixture(scope="module", params=["husk-agent", "husk-agent-asan"])
def agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    """One agent for the tests of a module. At its end it must exit with 0: a sanitizer's report does not."""
    agent = Agent(build(request.param), scratch_dir("agent"))
    yield agent
    status = agent.close()
    assert status == 0, agent.stderr()


@pytest.fixture
async def guest(agent: Agent) -> AsyncIterator[Guest]:
    guest = Guest(agent)
    await guest.connect()
    yield guest
    await guest.close()
