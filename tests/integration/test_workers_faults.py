"""Cancelled, aborted, cut off, drained: at every phase a worker lets go of everything, and no answer is wrong."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from kvmesh.errors import Aborted, DeadlineExceeded, KvmeshError, Unavailable
from kvmesh.kv import bitstream
from kvmesh.kv.client import StoreClient
from kvmesh.registry import Registry
from kvmesh.rpc.probe import serving
from kvmesh.types import WorkerStatistics
from tests.integration.calls import GREEDY, Calls, prompt, undisturbed
from tests.integration.mesh import Mesh, eventually

SLOW = {"fake_step_seconds": 0.02, "token_budget": 64}
LONG = replace(GREEDY, max_tokens=3000)


@pytest.fixture
async def slow() -> AsyncIterator[Mesh]:
    """Prefill takes 20 ms for 64 tokens, decode 20 ms for a token; the pools hold 1024 tokens."""
    settings = {**SLOW, "kv_blocks": 64}
    async with Mesh(prefill_settings=settings, decode_settings=settings) as mesh:
        yield mesh
        await mesh.assert_clean()


async def left(task: asyncio.Task[object]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def busy(statistics: WorkerStatistics) -> bool:
    return statistics.running > 0


def queued(statistics: WorkerStatistics) -> bool:
    return statistics.waiting > 0


# Chunks that are not what they should be ---------------------------------------------------------------------------


async def test_missing_chunks_are_recomputed_and_the_reply_says_so(mesh: Mesh, calls: Calls) -> None:
    text = prompt(700)
    ticket = calls.ticket(text)
    first = await calls.prefill(text, ticket)
    await StoreClient(mesh.channels).release(ticket)
    rest = await calls.decode(text, [first.first], ticket)
    assert (rest.started.fetched_tokens, rest.started.recomputed_tokens) == (512, 188)
    assert rest.started.recompute_reason == "the chunk at token 512 could not be fetched"
    assert [rest.tokens[0]] == undisturbed(text)


async def test_a_chunk_of_another_shape_is_a_miss_on_both_sides(mesh: Mesh, calls: Calls) -> None:
    text = prompt(700)
    ticket = calls.ticket(text)
    store = StoreClient(mesh.channels)
    await store.acquire(ticket)
    wrong = bitstream.encode(np.zeros((2, 2, 256, 1, 4), np.float16), "float16", 0)
    assert await store.put(ticket, 0, wrong, timeout=5)
    first = await calls.prefill(text, ticket)
    assert first.info.stored_tokens == 0
    rest = await calls.decode(text, [first.first], ticket)
    assert rest.started.fetched_tokens == 0
    assert rest.started.recompute_reason.startswith("the chunk at token 0 is unusable")
    assert [rest.tokens[0]] == undisturbed(text)


async def test_a_dead_store_costs_the_publishing_only(mesh: Mesh, calls: Calls) -> None:
    text = prompt(700)
    ticket = calls.ticket(text)
    await mesh.kill("kvstore-0")
    first = await calls.prefill(text, ticket)
    assert first.published.chunks == 0
    assert first.published.reason == "no source of the ticket answers"
    rest = await calls.decode(text, [first.first], ticket)
    assert rest.started.recomputed_tokens == 700
    assert [rest.tokens[0]] == undisturbed(text)


async def test_a_store_that_dies_between_prefill_and_decode(mesh: Mesh, calls: Calls) -> None:
    text = prompt(700)
    ticket = calls.ticket(text)
    first = await calls.prefill(text, ticket)
    await mesh.kill("kvstore-0")
    rest = await calls.decode(text, [first.first], ticket)
    assert [rest.tokens[0]] == undisturbed(text)
    assert rest.started.recompute_reason == "no source of the ticket answers"


async def test_a_store_that_dies_while_the_prompt_is_computed(slow: Mesh) -> None:
    calls = Calls(slow)
    ticket = calls.ticket(prompt(900))
    running = asyncio.create_task(calls.prefill(prompt(900), ticket))
    await slow.until("kvstore-0", lambda statistics: statistics.chunks >= 2)  # The first was acknowledged.
    await slow.kill("kvstore-0")
    first = await running
    assert 1 <= first.published.chunks < len(ticket.chunks)
    assert first.published.reason.startswith("kvstore-0 did not take the chunk at token ")
    rest = await calls.decode(prompt(900), [first.first], ticket)
    assert [rest.tokens[0]] == undisturbed(prompt(900))


async def test_a_frozen_store_holds_nobody_up_for_long(mesh: Mesh, calls: Calls) -> None:
    text = prompt(700)
    ticket = calls.ticket(text, ttl_ms=2000)
    first = await calls.prefill(text, ticket)
    mesh.freeze("kvstore-0")
    rest = await calls.decode(text, [first.first], ticket)
    assert [rest.tokens[0]] == undisturbed(text)
    other = prompt(700, salt=9)
    again = await calls.prefill(other, calls.ticket(other, ttl_ms=2000))
    assert again.first == undisturbed(other)[0][:1]
    assert again.published.chunks == 0
    mesh.thaw("kvstore-0")


# Left by the caller, at each phase ---------------------------------------------------------------------------------


async def test_cancelled_while_queued_for_prefill(slow: Mesh) -> None:
    calls = Calls(slow)
    running = asyncio.create_task(calls.prefill(prompt(900), calls.ticket(prompt(900), ttl_ms=2000)))
    await slow.until("prefill-0", busy)
    waiting = asyncio.create_task(calls.prefill(prompt(800, 3), calls.ticket(prompt(800, 3))))
    await slow.until("prefill-0", queued)
    await left(waiting)
    assert (await running).first == undisturbed(prompt(900))[0][:1]


async def test_cancelled_while_prefilling(slow: Mesh) -> None:
    calls = Calls(slow)
    running = asyncio.create_task(calls.prefill(prompt(900), calls.ticket(prompt(900))))
    await slow.until("kvstore-0", lambda statistics: statistics.chunks >= 1)
    await left(running)


async def test_cancelled_while_publishing(slow: Mesh) -> None:
    calls = Calls(slow)
    ticket = calls.ticket(prompt(900), ttl_ms=2000)
    events = calls.prefill_events(prompt(900), ticket)
    async for response in events:
        if response.WhichOneof("event") == "progress":
            await slow.until("kvstore-0", lambda statistics: statistics.leases == 1)
            await slow.until("prefill-0", busy)
            slow.freeze("kvstore-0")
        if response.WhichOneof("event") == "first_tokens":
            break
    await events.aclose()
    slow.thaw("kvstore-0")


async def test_abandoned_after_the_hand_over(slow: Mesh) -> None:
    calls = Calls(slow)
    ticket = calls.ticket(prompt(300))
    await calls.prefill(prompt(300), ticket, request_id="r")
    assert (await slow.statistics("kvstore-0")).leases == 1
    assert await calls.abort_prefill("r", ticket) is False
    assert (await slow.statistics("kvstore-0")).leases == 0
    assert await calls.abort_prefill("r", ticket) is False


async def test_cancelled_while_queued_for_decode(slow: Mesh) -> None:
    calls = Calls(slow)
    ticket = calls.ticket(prompt(800, 3))
    first = await calls.prefill(prompt(800, 3), ticket)
    running = asyncio.create_task(calls.decode(prompt(900), [[]]))
    await slow.until("decode-0", busy)
    waiting = asyncio.create_task(calls.decode(prompt(800, 3), [first.first], ticket))
    await slow.until("decode-0", queued)
    await left(waiting)
    assert await calls.abort_prefill("gone", ticket) is False
    assert [(await running).tokens[0]] == undisturbed(prompt(900))


async def test_cancelled_while_fetching(slow: Mesh) -> None:
    calls = Calls(slow)
    ticket = calls.ticket(prompt(700), ttl_ms=2000)
    first = await calls.prefill(prompt(700), ticket)
    slow.freeze("kvstore-0")
    fetching = asyncio.create_task(calls.decode(prompt(700), [first.first], ticket))
    await slow.until("decode-0", lambda statistics: statistics.leases == 1)
    await left(fetching)
    slow.thaw("kvstore-0")


async def test_cancelled_while_decoding(slow: Mesh) -> None:
    calls = Calls(slow)
    ticket = calls.ticket(prompt(300))
    first = await calls.prefill(prompt(300), ticket)
    events = calls.decode_events(prompt(300), [first.first], ticket, replace(GREEDY, max_tokens=500))
    async for response in events:
        if response.samples:
            break
    await events.aclose()


async def test_a_deadline_ends_a_request(slow: Mesh) -> None:
    calls = Calls(slow)
    with pytest.raises(DeadlineExceeded):
        await calls.decode(prompt(300), [[]], None, replace(GREEDY, max_tokens=500), timeout=0.5)
    with pytest.raises(DeadlineExceeded):
        await calls.prefill(prompt(900), calls.ticket(prompt(900)), timeout=0.2)


async def test_a_reader_that_stops_reading_is_let_go_of_when_it_leaves(calls: Calls) -> None:
    events = calls.decode_events(prompt(20), [[]], None, LONG)
    await anext(events)
    await calls.mesh.until("decode-0", lambda statistics: statistics.tokens_total >= 500)
    await events.aclose()


# Aborted by id -----------------------------------------------------------------------------------------------------


async def test_abort_by_id_ends_the_stream_and_frees_all(slow: Mesh) -> None:
    calls = Calls(slow)
    ticket = calls.ticket(prompt(900))
    prefilling = asyncio.create_task(calls.prefill(prompt(900), ticket, request_id="p"))
    decoding = asyncio.create_task(calls.decode(prompt(300), [[]], request_id="d"))
    await slow.until("prefill-0", busy)
    await slow.until("decode-0", busy)
    assert await calls.abort_prefill("p", ticket) is True
    assert await calls.abort_decode("d") is True
    assert await calls.abort_decode("d") is False
    for task in (prefilling, decoding):
        with pytest.raises(Aborted):
            await task
    await slow.assert_clean()


# Drained, broken, restarted ----------------------------------------------------------------------------------------


async def test_drain_finishes_what_runs_and_takes_nothing_new(slow: Mesh) -> None:
    calls = Calls(slow)
    running = asyncio.create_task(calls.decode(prompt(100), [[]]))
    await slow.until("decode-0", busy)
    draining = asyncio.create_task(slow["decode-0"].process.drain(30.0))
    await slow.until("decode-0", lambda statistics: statistics.draining)
    assert not await serving(slow["decode-0"].own_address)
    with pytest.raises(Unavailable, match="draining"):
        await calls.decode(prompt(10), [[]])
    assert [(await running).tokens[0]] == undisturbed(prompt(100))
    await draining
    await slow["decode-0"].stop()


async def test_what_outlasts_the_grace_ends_as_unavailable(slow: Mesh) -> None:
    calls = Calls(slow)
    running = asyncio.create_task(calls.decode(prompt(100), [[]], None, replace(GREEDY, max_tokens=500)))
    await slow.until("decode-0", busy)
    await slow["decode-0"].process.drain(0.05)
    with pytest.raises(Unavailable):
        await running
    await slow["decode-0"].stop()


async def test_a_worker_that_dies_resets_its_streams(slow: Mesh) -> None:
    calls = Calls(slow)
    running = asyncio.create_task(calls.decode(prompt(100), [[]]))
    await slow.until("decode-0", busy)
    await slow.kill("decode-0")
    with pytest.raises(KvmeshError):
        await running
    await slow.restart("decode-0")
    assert [(await calls.decode(prompt(100), [[]])).tokens[0]] == undisturbed(prompt(100))


async def test_a_redis_that_comes_and_goes_disturbs_no_request(mesh: Mesh, calls: Calls) -> None:
    await mesh.kill_redis()
    text = prompt(300)
    ticket = calls.ticket(text)
    first = await calls.prefill(text, ticket)
    assert [(await calls.decode(text, [first.first], ticket)).tokens[0]] == undisturbed(text)
    await mesh.restart_redis()


async def test_an_engine_that_breaks_fails_its_requests_and_says_not_serving() -> None:
    async with Mesh(kvstore=0, prefill=0, decode_settings=SLOW) as mesh:
        calls = Calls(mesh)
        worker = mesh["decode-0"].process
        running = asyncio.create_task(calls.decode(prompt(100), [[]]))
        await mesh.until("decode-0", busy)
        worker.worker.engine.fail(RuntimeError("boom"))
        with pytest.raises(Unavailable, match="boom"):
            await running
        with pytest.raises(Unavailable):
            await calls.decode(prompt(100), [[]])
        assert not await serving(mesh["decode-0"].own_address)
        registry = Registry(mesh.redis.url)
        await eventually(lambda: _empty(registry))
        await registry.close()


async def _empty(registry: Registry) -> bool:
    return not await registry.list()
