"""Watchers see every event in order, or are told that they did not."""

from contextlib import aclosing

import pytest

from kvmesh.errors import Overloaded
from kvmesh_kvstore.events import EventLog, EventType


async def read(log: EventLog, after: int, count: int):
    async with aclosing(log.watch(after)) as events:
        return [await anext(events) for _ in range(count)]


def publish(log: EventLog, count: int) -> None:
    for i in range(count):
        log.publish(EventType.STORED, b"key", i)


async def test_events_come_in_order_from_any_point():
    log = EventLog()
    publish(log, 600)
    assert [event.sequence for event in await read(log, 0, 600)] == list(range(1, 601))
    assert [event.sequence for event in await read(log, 598, 2)] == [599, 600]


async def test_a_watcher_who_falls_behind_the_ring_starts_over_from_now():
    log = EventLog(capacity=4)
    publish(log, 2)
    async with aclosing(log.watch(0)) as events:
        assert (await anext(events)).sequence == 1
        publish(log, 10)
        assert (await anext(events)).sequence == 2
        reset = await anext(events)
        assert (reset.type, reset.sequence) == (EventType.RESET, 12)
        publish(log, 1)
        assert (await anext(events)).sequence == 13


async def test_a_sequence_from_the_future_is_of_another_epoch():
    log = EventLog()
    publish(log, 3)
    assert [event.type for event in await read(log, 4, 1)] == [EventType.RESET]


async def test_watchers_are_few_and_leave():
    log = EventLog(max_watchers=1)
    publish(log, 1)
    async with aclosing(log.watch(0)) as first:
        await anext(first)
        with pytest.raises(Overloaded):
            await read(log, 0, 1)
    assert len(await read(log, 0, 1)) == 1


async def test_a_closed_log_ends_its_watches():
    log = EventLog()
    publish(log, 2)
    log.close()
    assert [event.sequence async for event in log.watch(0)] == [1, 2]
