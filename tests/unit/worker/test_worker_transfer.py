"""KV out of one engine and into another through a store that may lose, damage or refuse chunks."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest

from kvmesh.engine.api import Admitted, KvReady, TokenOutput
from kvmesh.engine.fake import fake_engine
from kvmesh.kv import bitstream
from kvmesh.worker.job import Job
from kvmesh.worker.publication import Publication
from kvmesh.worker.thread import EngineThread
from kvmesh.worker.transfer import Importer
from tests.unit.worker.fakes import MemoryStore, job

POOL = ThreadPoolExecutor(1)


@asynccontextmanager
async def engine() -> AsyncIterator[EngineThread]:
    async with EngineThread(fake_engine(blocks=256)) as thread:
        yield thread


async def publish(store: MemoryStore, work: Job, finish: float = 5.0) -> tuple[int, str]:
    """Computes the prompt in an engine of its own, and publishes all of its chunks."""
    async with engine() as thread:
        events = thread.subscribe(work.request_id)
        await thread.add(work.engine_request(load_kv=True, prefill_only=True))
        publication = Publication(store, POOL, work.ticket, range(len(work.chunks)), dtype="float32")
        async with publication:
            await thread.start(work.request_id, 0, publication.ranges)
            last = False
            while not last:
                for event in await events.get():
                    last |= isinstance(event, TokenOutput) and event.last
                    if isinstance(event, KvReady):
                        publication.offer(event)
            return await publication.finish(finish)


async def continue_from(store: MemoryStore, work: Job) -> tuple[int, str, list[int]]:
    """(tokens imported, why not all, output) of an engine that fetches what it can."""
    async with engine() as thread:
        events = thread.subscribe(work.request_id)
        await thread.add(work.engine_request(load_kv=True))
        (admitted,) = await events.get()
        assert isinstance(admitted, Admitted)
        importer = Importer(store, thread, POOL, in_flight=2)
        imported = await importer.fetch(work.request_id, work.ticket, work.chunks, 0)
        await thread.start(work.request_id, imported.end)
        output: list[int] = []
        while len(output) < work.sampling.max_tokens:
            output += [event.token_id for event in await events.get() if isinstance(event, TokenOutput)]
        return imported.end, imported.reason, output


async def undisturbed(work: Job) -> list[int]:
    return (await continue_from(MemoryStore(), work))[2]


async def test_what_one_engine_publishes_another_goes_on_from() -> None:
    store, work = MemoryStore(), job(1000)
    assert await publish(store, work) == (4, "")
    end, reason, output = await continue_from(store, work)
    assert (end, reason) == (1000, "")
    assert output == await undisturbed(work)


@pytest.mark.parametrize("lost", range(4))
async def test_an_import_ends_at_the_first_miss_and_the_rest_is_recomputed(lost: int) -> None:
    store, work = MemoryStore(), job(1000)
    await publish(store, work)
    del store.chunks[work.chunks[lost].key]
    end, reason, output = await continue_from(store, work)
    assert end == lost * 256
    assert reason == f"the chunk at token {lost * 256} could not be fetched"
    assert output == await undisturbed(work)


def damaged(bits: bytes) -> bytes:
    return bits[:-1] + bytes([bits[-1] ^ 1])


def of_another_layer(bits: bytes) -> bytes:
    return bitstream.encode(bitstream.decode(bits).data, "float32", 1)


def shorter(bits: bytes) -> bytes:
    return bitstream.encode(np.ascontiguousarray(bitstream.decode(bits).data[:, :, :-1]), "float32", 0)


def of_another_dtype(bits: bytes) -> bytes:
    return bitstream.encode(np.zeros(bitstream.decode(bits).data.shape, np.float16), "float16", 0)


@pytest.mark.parametrize("spoil", [damaged, of_another_layer, shorter, of_another_dtype])
async def test_a_chunk_that_is_not_what_the_ticket_says_is_a_miss(spoil) -> None:
    store, work = MemoryStore(), job(1000)
    await publish(store, work)
    key = work.chunks[1].key
    store.chunks[key] = spoil(store.chunks[key])
    end, reason, output = await continue_from(store, work)
    assert end == 256
    assert reason.startswith("the chunk at token 256 is unusable: ")
    assert output == await undisturbed(work)


async def test_no_chunk_is_asked_for_after_a_miss() -> None:
    store, work = MemoryStore(), job(3000)
    await publish(store, work)
    del store.chunks[work.chunks[0].key]
    store.calls.clear()
    await continue_from(store, work)
    assert store.calls == ["get 0"]


async def test_a_refused_chunk_ends_the_publishing_and_is_named() -> None:
    store, work = MemoryStore(), job(3000)
    store.refuse = {work.chunks[2].key}
    assert await publish(store, work) == (2, "store did not take the chunk at token 512")
    assert len([call for call in store.calls if call.startswith("put")]) < len(work.chunks)


async def test_a_store_that_hangs_is_given_up_on() -> None:
    store, work = MemoryStore(), job(600)
    store.hang = True
    assert await publish(store, work, finish=0.01) == (0, "store was too slow to take the chunk at token 0")


async def test_chunks_that_are_there_are_not_put_again() -> None:
    store, work = MemoryStore(), job(600)
    async with Publication(store, POOL, work.ticket, [1], dtype="float32") as publication:
        assert publication.ranges == [(256, 512)]
        data = np.zeros((2, 2, 256, 1, 4), np.float32)
        publication.offer(KvReady("r", 256, data))
        assert await publication.finish(5) == (3, "")
    assert store.calls == ["put 1"]


async def test_without_a_ticket_there_is_nothing_to_publish() -> None:
    async with Publication(MemoryStore(), POOL, None, [], dtype="float32") as publication:
        assert publication.ranges == []
        assert await publication.finish(5) == (0, "")


async def test_cancelling_an_import_leaves_no_task_behind() -> None:
    store, work = MemoryStore(), job(1000)
    await publish(store, work)
    before = asyncio.all_tasks()
    async with engine() as thread:
        await thread.add(work.engine_request(load_kv=True))
        fetching = asyncio.create_task(Importer(store, thread, POOL).fetch("r", work.ticket, work.chunks, 0))
        await asyncio.sleep(0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        thread.abort_soon("r")
        assert (await thread.statistics()).blocks_used == 0
        assert await thread.check_integrity() == []
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
