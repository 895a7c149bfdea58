"""A prompt's KV over a link that is slow, slows down or stalls: it comes coarser or is computed, and tokens stay right.

The codec of these tests is exact in every quality, so that a wrong token means wrong KV and nothing else.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from kvmesh.engine.api import KvReady, TokenOutput
from kvmesh.engine.fake import fake_engine
from kvmesh.kv import bitstream
from kvmesh.kv.client import StoreClient
from kvmesh.kv.codec import RAW, TRANSFORM, Codec, Raw
from kvmesh.kv.codecs.adaptive import Adaptive
from kvmesh.rpc.channel import ChannelPool
from kvmesh.scheduling.link import FAST
from kvmesh.types import ChunkSource, Readers
from kvmesh.worker.job import Job
from kvmesh.worker.publication import Publication
from kvmesh.worker.streaming import FASTER
from kvmesh.worker.thread import EngineThread
from kvmesh.worker.traffic import Traffic
from kvmesh.worker.transfer import Importer
from tests.integration.throttled_store import Line, ThrottledStore, serving
from tests.unit.worker.fakes import MemoryStore, job

POOL = ThreadPoolExecutor(1)
BALLAST = (5, 14)
"""Bytes a token of the second and third quality layer; the first has four."""


@dataclass(frozen=True)
class Exact:
    """All of the fake model's KV in the first layer: the elements of a token are equal. The others are ballast."""

    format = TRANSFORM
    namespace = "test"

    def encode(self, data, first_layer, start=0):
        values = data[0, 0, :, 0, 0]
        assert (data == values[:, None, None]).all()
        return (values.tobytes(), *(bytes(size * len(values)) for size in BALLAST))

    def decode(self, parts, shape, dtype, first_layer):
        return np.ascontiguousarray(np.broadcast_to(np.frombuffer(parts[0], dtype)[:, None, None], shape))


CODEC: Codec = Adaptive((Raw(), Exact()), "test")


class RemoteTraffic(Traffic):
    """Takes the loopback address for one of another host."""

    def remote(self, source):
        return True


@dataclass
class Case:
    """A worker on another host than the store, and its prompt of eight chunks and a tail."""

    store: ThrottledStore
    address: str
    traffic: Traffic = field(default_factory=RemoteTraffic)
    work: Job = field(default_factory=lambda: job(2100))

    async def run(self, *, limit=None, floor=1, measured=None):
        """What was imported, and the tokens that follow."""
        self.traffic.floor = floor
        ticket = replace(self.work.ticket, sources=(ChunkSource("store", self.address),))
        if measured:
            link = self.traffic.down(ticket.sources[0])
            link.end(link.begin(0.0), int(measured), 1.0)
        async with ChannelPool() as channels, EngineThread(fake_engine(blocks=256)) as thread:
            events = thread.subscribe("r")
            await thread.add(self.work.engine_request(load_kv=True))
            await events.get()
            importer = Importer(StoreClient(channels), thread, POOL, codec=CODEC, traffic=self.traffic)
            until = limit and asyncio.get_running_loop().time() + limit
            imported = await importer.fetch("r", ticket, ticket.chunks, 0, prompt=2100, limit=until)
            await thread.start("r", imported.end)
            output = []
            while len(output) < 8:
                output += [event.token_id for event in await events.get() if isinstance(event, TokenOutput)]
            return imported, output


@asynccontextmanager
async def case(
    rates: dict[int, float], tokens_per_second: float = 0.0, readers: Readers = Readers(True)
) -> AsyncIterator[Case]:
    store = ThrottledStore(await encoded(readers), Line(rates))
    async with serving(store) as address:
        result = Case(store, address)
        if tokens_per_second:
            result.traffic.compute.observe(0, 1000, 1000 / tokens_per_second)
        yield result


async def encoded(readers: Readers) -> dict[bytes, bytes]:
    """The prompt's chunks as a prefill worker publishes them for readers elsewhere."""
    store, work = MemoryStore(), job(2100)
    async with EngineThread(fake_engine(blocks=256)) as thread:
        events = thread.subscribe("r")
        await thread.add(work.engine_request(load_kv=True, prefill_only=True))
        chunks = range(len(work.chunks))
        publication = Publication(store, POOL, work.ticket, chunks, dtype="float32", codec=CODEC, readers=readers)
        async with publication:
            await thread.start("r", 0, publication.ranges)
            last = False
            while not last:
                for event in await events.get():
                    last |= isinstance(event, TokenOutput) and event.last
                    if isinstance(event, KvReady):
                        publication.offer(event)
            assert await publication.finish(10) == (9, "")
    expected_codec = RAW.id if readers.bytes_per_second else TRANSFORM.id
    assert {bitstream.read_header(bits).codec for bits in store.chunks.values()} == {expected_codec}
    return store.chunks


async def expected() -> list[int]:
    async with EngineThread(fake_engine(blocks=256)) as thread:
        events = thread.subscribe("r")
        await thread.add(job(2100).engine_request(load_kv=False))
        output: list[int] = []
        while len(output) < 8:
            output += [event.token_id for event in await events.get() if isinstance(event, TokenOutput)]
        return output


async def test_with_time_enough_chunks_come_in_their_finest_version():
    async with case({0: 1e7}) as it:
        imported, output = await it.run(limit=20.0, measured=1e7)
        assert (imported.end, imported.reason, dict(imported.qualities)) == (2100, "", {"transform:3": 9})
        assert output == await expected()
        assert imported.throughput > 0
        assert it.traffic.fetched.bytes == imported.bytes == it.store.line.sent


async def test_a_limit_makes_chunks_coarser_but_never_the_tail_nor_below_the_floor():
    async with case({0: 50_000}) as it:
        imported, output = await it.run(limit=0.6, floor=2, measured=50_000)
        assert imported.end == 2100
        assert imported.qualities["transform:2"] >= 4
        assert not imported.qualities["transform:1"]
        assert it.store.asked[-1][1] == 3
        assert output == await expected()


async def test_a_link_that_slows_down_mid_stream_gets_coarser_chunks():
    async with case({0: 200_000, 18_000: 8_000}) as it:
        imported, output = await it.run(limit=1.5, measured=200_000)
        layers = [layers for _, layers in it.store.asked[:-1]]
        assert layers[0] == 3
        assert layers[-1] == 1
        assert imported.end == 2100
        assert output == await expected()


async def test_over_a_fast_link_what_has_one_version_is_asked_for_at_once():
    async with case({0: 1e9}, readers=Readers(True, 1e12)) as it:
        imported, output = await it.run(measured=FAST)
        assert (imported.end, dict(imported.qualities)) == (2100, {"raw": 9})
        assert [layers for _, layers in it.store.asked] == [0] * 9
        assert imported.throughput > 0
        assert output == await expected()


async def test_a_fast_link_that_stalls_is_asked_chunk_by_chunk_from_then_on():
    async with case({0: 1e9}, 2000.0, readers=Readers(True, 1e12)) as it:
        it.store.stalled = {it.work.chunks[3].key}
        imported, output = await it.run(measured=FAST)
        assert (imported.end, it.traffic.missed_chunks) == (768, 1)
        assert output == await expected()
        [link] = it.traffic._down.values()
        assert not link.fast


async def test_a_chunk_that_stalls_is_given_up_and_the_rest_computed():
    async with case({0: 1e6}, 2000.0) as it:
        it.store.stalled = {it.work.chunks[3].key}
        imported, output = await it.run(measured=1e6)
        assert (imported.end, imported.chunks) == (768, 3)
        assert imported.reason == "the chunk at token 768 could not be fetched"
        assert it.traffic.missed_chunks == 1
        assert output == await expected()


async def test_where_computing_is_faster_the_rest_is_computed_by_choice():
    async with case({0: 3_000}, 1e6) as it:
        imported, output = await it.run(measured=3_000)
        assert (imported.end, imported.reason, imported.missed) == (0, FASTER, False)
        assert it.store.asked == []
        assert it.traffic.missed_chunks == 0
        assert output == await expected()


async def test_a_link_that_becomes_too_slow_is_left_mid_stream():
    async with case({0: 1e6, 8_000: 1_000}, 20_000.0) as it:
        imported, output = await it.run(measured=1e6)
        assert 0 < imported.end < 2100
        assert output == await expected()


async def test_a_damaged_chunk_is_a_counted_miss():
    async with case({0: 1e7}) as it:
        key = it.work.chunks[2].key
        it.store.chunks[key] = it.store.chunks[key][:200] + b"\xff" + it.store.chunks[key][201:]
        imported, output = await it.run(measured=1e7)
        assert imported.end == 512
        assert imported.reason.startswith("the chunk at token 512 is unusable")
        assert it.traffic.missed_chunks == 1
        assert output == await expected()


async def test_a_chunk_that_no_source_has_ends_the_stream():
    async with case({0: 1e7}) as it:
        del it.store.chunks[it.work.chunks[4].key]
        imported, output = await it.run(measured=1e7)
        assert (imported.end, imported.reason) == (1024, "the chunk at token 1024 could not be fetched")
        assert output == await expected()


async def test_requests_that_share_a_link_expect_their_share():
    async with case({0: 60_000}) as it:
        link = it.traffic.down(ChunkSource("store", it.address))
        link.requests = 3
        crowded, _ = await it.run(limit=1.0, measured=60_000)
        assert link.requests == 3
        assert crowded.qualities["transform:1"] >= 4


async def test_cancelling_leaves_no_transfer_behind():
    async with case({0: 5_000}) as it:
        running = asyncio.create_task(it.run(measured=5_000))
        while not it.store.asked:  # noqa: ASYNC110  # It is the store that is waited for.
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        link = it.traffic.down(ChunkSource("store", it.address))
        assert (link.requests, link._active) == (0, 0)
