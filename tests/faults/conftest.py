"""What several of these files start: a registry that misbehaves, an image store, and an agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from image.image_store import ImageStore
from tests.fakes.registry import FakeRegistry
from tests.kit.agent import Agent, build
from tests.kit.pulls import open_store
from tests.kit.scratch import scratch_dir


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    """Serve an empty registry."""
    with FakeRegistry().serving() as serving:
        yield serving


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """Return an empty store, which the test closes."""
    return open_store(tmp_path)


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    """Run an agent in namespaces; it must end in order."""
    agent = Agent(build("husk-agent"), scratch_dir("agent"))
    yield agent
    assert agent.close() == 0, agent.stderr()
