"""Subscribers get every event in order, and a slow one is ended alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from sandbox import events
from sandbox.errors import FellBehind
from sandbox.events import Event, EventKind, Events, Subscription
from sandbox.records import ContainerState, PodRecord, PodState
from sandbox.spec import PodId, PodSpec
from tests.fakes.inventory import make_inventory


class FakePod:
    def __init__(self, state: PodState = PodState.READY) -> None:
        self.id = PodId("p")
        spec = PodSpec(name="n", namespace="ns", uid="u")
        self.record = PodRecord(id=self.id, spec=spec, created_at_ns=1, state=state)


@pytest.fixture
def hub(tmp_path: Path) -> Events:
    return Events(make_inventory(tmp_path))


def started(hub: Events) -> None:
    hub.pod_changed(cast(Any, FakePod()))


async def next_of(subscription: Subscription, count: int) -> list[Event]:
    found: list[Event] = []
    async with asyncio.timeout(5):
        async for event in subscription:
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_ready_pod_emits_created_and_started(hub: Events) -> None:
    with hub.subscribe() as one, hub.subscribe() as two:
        started(hub)
        for subscription in (one, two):
            seen = await next_of(subscription, 2)
            assert [event.kind for event in seen] == [EventKind.CREATED, EventKind.STARTED]
            assert {event.id for event in seen} == {"p"}
            assert seen[0].at_ns < seen[1].at_ns


async def test_event_times_rise_when_the_clock_steps_back(
    hub: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.subscribe() as subscription:
        started(hub)
        monkeypatch.setattr("time.time_ns", lambda: 5)
        started(hub)
        times = [event.at_ns for event in await next_of(subscription, 4)]
        assert times == sorted(set(times))


async def test_event_wakes_a_waiting_reader(hub: Events) -> None:
    with hub.subscribe() as subscription:
        waiting = asyncio.create_task(next_of(subscription, 2))
        await asyncio.sleep(0)
        started(hub)
        assert len(await waiting) == 2


async def test_states_that_clients_do_not_see_emit_nothing(hub: Events) -> None:
    with hub.subscribe() as subscription:
        pod = FakePod(PodState.STARTING)
        hub.pod_changed(cast(Any, pod))
        hub.pod_deleted(cast(Any, pod))
        container = type("C", (), {"record": type("R", (), {"state": ContainerState.CREATING})})
        hub.container_changed(cast(Any, container))
        hub.container_deleted(cast(Any, container))
        hub.close()
        assert [event async for event in subscription] == []


async def test_slow_reader_fails_with_fell_behind_and_its_queue_is_dropped(
    hub: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "QUEUE_MAX", 4)
    with hub.subscribe() as slow, hub.subscribe() as quick:
        for _ in range(5):
            started(hub)
            assert len(await next_of(quick, 2)) == 2
        assert not slow._queue, "what cannot be delivered is not kept"
        with pytest.raises(FellBehind):
            await next_of(slow, 1)
    with hub.subscribe() as again:
        started(hub)
        assert len(await next_of(again, 2)) == 2


async def test_close_ends_current_and_later_subscriptions(hub: Events) -> None:
    with hub.subscribe() as subscription:
        started(hub)
        waiting = asyncio.create_task(next_of(subscription, 99))
        await asyncio.sleep(0)
        hub.close()
        assert len(await waiting) == 2, "events from before are delivered"
    with hub.subscribe() as late:
        assert [event async for event in late] == []


async def test_subscription_ends_with_its_context(hub: Events) -> None:
    with pytest.raises(KeyError), hub.subscribe():
        raise KeyError
    assert not hub._subscriptions
