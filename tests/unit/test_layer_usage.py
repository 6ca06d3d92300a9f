"""Measuring writable layers: no caller waits for a large tree, and no tree is read too often."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator

import pytest

from image.stores import Usage
from sandbox.stats import layer_usage
from sandbox.stats.layer_usage import LayerUsage


class Subject:
    """The part of a container that LayerUsage uses."""

    def __init__(self, id: str) -> None:
        self.id = id


class Store:
    """Records which trees are measured, and blocks each until `gate` is set."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.running = self.most = 0
        self.broken = False

    def usage(self, key: str) -> Usage:
        self.running += 1
        self.most = max(self.most, self.running)
        assert self.gate.wait(10)
        self.running -= 1
        self.measured.append(key)
        if self.broken:
            raise PermissionError(key)
        return Usage(bytes=4096 * len(self.measured), inodes=3)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
async def layers(store: Store) -> AsyncIterator[LayerUsage]:
    layers = LayerUsage(store)
    yield layers
    store.gate.set()
    await layers.close()


async def sample(layers: LayerUsage, *subjects: Subject) -> list[int | None]:
    found = await layers.sample(subjects)
    return [one.bytes if one else None for one in found]


async def all_measured(layers: LayerUsage) -> None:
    for task in list(layers._tasks.values()):
        await task


async def test_new_container_is_measured_at_once(layers: LayerUsage, store: Store) -> None:
    assert await sample(layers, Subject("a"), Subject("b")) == [4096, 8192]
    assert store.measured == ["a", "b"]


async def test_fresh_value_is_not_measured_again(layers: LayerUsage, store: Store) -> None:
    subject = Subject("a")
    assert await sample(layers, subject) == await sample(layers, subject) == [4096]
    assert store.measured == ["a"]


async def test_old_value_is_returned_while_it_is_measured_again(
    layers: LayerUsage, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_usage, "FRESH_S", 0)
    monkeypatch.setattr(layer_usage, "REST_FACTOR", 0)
    subject = Subject("a")
    assert await sample(layers, subject) == [4096]
    store.gate.clear()
    assert await sample(layers, subject) == [4096], "the old value, at once"
    store.gate.set()
    await all_measured(layers)
    assert await sample(layers, subject) == [8192]


async def test_large_tree_is_waited_for_briefly(
    layers: LayerUsage, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_usage, "FIRST_WAIT_S", 0.01)
    store.gate.clear()
    subjects = [Subject("a"), Subject("b")]
    assert await sample(layers, *subjects) == [None, None]
    assert await sample(layers, *subjects) == [None, None]
    store.gate.set()
    await all_measured(layers)
    assert await sample(layers, *subjects) == [4096, 8192]
    assert store.most == 1, "one tree at a time"


async def test_tree_that_takes_long_is_measured_less_often(
    layers: LayerUsage, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_usage, "FRESH_S", 0)
    monkeypatch.setattr(layer_usage, "REST_FACTOR", 1e9)
    subject = Subject("a")
    await sample(layers, subject)
    await sample(layers, subject)
    assert store.measured == ["a"]


async def test_unreadable_layer_is_logged_and_has_no_value(
    layers: LayerUsage, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.broken = True
    assert await sample(layers, Subject("a")) == [None]
    assert "container a" in caplog.text


async def test_values_go_with_their_container(layers: LayerUsage) -> None:
    subject = Subject("a")
    await sample(layers, subject)
    assert len(layers._known) == 1
    del subject
    assert len(layers._known) == 0
