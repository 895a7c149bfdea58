"""Who releases a lease, and when."""

import asyncio
from contextlib import suppress

import pytest

from kvmesh.types import KvTicket
from kvmesh.worker.lease import Leases
from tests.unit.worker.fakes import MemoryStore, ticket

TICKET = ticket(range(100))


async def settled(leases: Leases) -> None:
    await leases.close()
    await asyncio.sleep(0)
    assert leases.count == 0


@pytest.mark.parametrize(("hand_over", "held"), [(True, {"lease"}), (False, set())])
async def test_a_clean_exit_hands_over_or_releases(hand_over: bool, held: set[str]) -> None:
    store = MemoryStore()
    leases = Leases(store)
    async with leases.hold(TICKET, hand_over=hand_over) as granted:
        assert granted
        assert (store.leases, leases.count) == ({"lease"}, 1)
    await settled(leases)
    assert store.leases == held


@pytest.mark.parametrize("hand_over", [True, False])
async def test_an_error_releases(hand_over: bool) -> None:
    store = MemoryStore()
    leases = Leases(store)
    with suppress(ZeroDivisionError):
        async with leases.hold(TICKET, hand_over=hand_over):
            raise ZeroDivisionError
    await settled(leases)
    assert store.leases == set()


async def test_a_cancellation_releases_without_waiting_for_the_store() -> None:
    class Slow(MemoryStore):
        async def release(self, ticket: KvTicket) -> None:
            await answers.wait()
            await super().release(ticket)

    store, answers, entered = Slow(), asyncio.Event(), asyncio.Event()
    leases = Leases(store)

    async def hold() -> None:
        async with leases.hold(TICKET, hand_over=True):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert leases.count == 1
    answers.set()
    await settled(leases)
    assert store.leases == set()


async def test_a_lease_is_renewed_until_it_is_left() -> None:
    class Counting(MemoryStore):
        async def renew(self, ticket: KvTicket) -> frozenset[int]:
            renewed.set()
            return await super().renew(ticket)

    renewed = asyncio.Event()
    store = Counting()
    async with Leases(store).hold(ticket(range(100), ttl_ms=1), hand_over=True):
        await renewed.wait()
    assert store.calls[:2] == ["acquire", "renew"]


@pytest.mark.parametrize("nothing", [None, KvTicket("", "lease", 1000)])
async def test_without_chunks_nothing_is_held(nothing: KvTicket | None) -> None:
    store = MemoryStore()
    async with Leases(store).hold(nothing, hand_over=False) as granted:
        assert not granted
    assert store.calls == []
