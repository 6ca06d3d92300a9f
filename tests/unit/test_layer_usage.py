"""Measuring writable layers: nobody waits for a walk, and nothing is walked too often."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from image.stores import Usage
from sandbox.stats import layer_usage
from sandbox.stats.layer_usage import LayerUsage


class Subject:
    """As much of a container as the meter looks at."""

    def __init__(self, id: str) -> None:
        self.id = id


class Store:
    def __init__(self) -> None:
        self.walked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.running = self.most = 0
        self.broken = False

    def usage(self, key: str) -> Usage:
        self.running += 1
        self.most = max(self.most, self.running)
        assert self.gate.wait(10)
        self.running -= 1
        self.walked.append(key)
        if self.broken:
            raise PermissionError(key)
        return Usage(bytes=4096 * len(self.walked), inodes=3)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
async def meter(store: Store) -> AsyncIterator[LayerUsage]:
    meter = LayerUsage(cast(Any, store))
    yield meter
    store.gate.set()
    await meter.close()


async def look(meter: LayerUsage, *subjects: Subject) -> list[int | None]:
    found = await meter.look(cast(Any, subjects))
    return [one.bytes if one else None for one in found]


async def walked(meter: LayerUsage) -> None:
    """Until no walk is under way."""
    for walk in list(meter._walks.values()):
        await walk


async def test_a_new_container_is_measured_at_once(meter: LayerUsage, store: Store) -> None:
    assert await look(meter, Subject("a"), Subject("b")) == [4096, 8192]
    assert store.walked == ["a", "b"]


async def test_what_is_fresh_is_not_walked_again(meter: LayerUsage, store: Store) -> None:
    subject = Subject("a")
    assert await look(meter, subject) == await look(meter, subject) == [4096]
    assert store.walked == ["a"]


async def test_what_is_old_is_answered_while_it_is_walked(
    meter: LayerUsage, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_usage, "FRESH_S", 0)
    monkeypatch.setattr(layer_usage, "REST_FACTOR", 0)
    subject = Subject("a")
    assert await look(meter, subject) == [4096]
    store.gate.clear()
    assert await look(meter, subject) == [4096], "the old value, at once"
    store.gate.set()
    await walked(meter)
    assert await look(meter, subject) == [8192]


async def test_nobody_waits_long_for_a_large_tree(
    meter: LayerUsage, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_usage, "FIRST_WAIT_S", 0.01)
    store.gate.clear()
    subjects = [Subject("a"), Subject("b")]
    assert await look(meter, *subjects) == [None, None]
    assert await look(meter, *subjects) == [None, None]
    store.gate.set()
    await walked(meter)
    assert await look(meter, *subjects) == [4096, 8192]
    assert store.most == 1, "one walk at a time"


async def test_a_tree_that_takes_long_is_walked_less_often(
    meter: LayerUsage, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_usage, "FRESH_S", 0)
    monkeypatch.setattr(layer_usage, "REST_FACTOR", 1e9)
    subject = Subject("a")
    await look(meter, subject)
    await look(meter, subject)
    assert store.walked == ["a"]


async def test_a_layer_that_cannot_be_read(
    meter: LayerUsage, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.broken = True
    assert await look(meter, Subject("a")) == [None]
    assert "container a" in caplog.text


async def test_nothing_is_kept_of_what_is_gone(meter: LayerUsage) -> None:
    subject = Subject("a")
    await look(meter, subject)
    assert len(meter._known) == 1
    del subject
    assert len(meter._known) == 0
