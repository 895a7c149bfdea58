"""A mesh's codec: chunks travel encoded, and one that was encoded otherwise is a miss, never wrong KV."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from pydantic import ValidationError

from kvmesh.engine.api import Admitted, KvReady, TokenOutput
from kvmesh.engine.fake import fake_engine
from kvmesh.errors import NotFound
from kvmesh.kv.codec import Codec, Raw
from kvmesh.kv.codecs.cachegen import CacheGen
from kvmesh.kv.codecs.calibration import Recipe, calibrate
from kvmesh.kv.codecs.int8 import Int8
from kvmesh.kv.codecs.profile import Profile
from kvmesh.worker.config import WorkerConfig
from kvmesh.worker.job import Job
from kvmesh.worker.model import load_model
from kvmesh.worker.publication import Publication
from kvmesh.worker.thread import EngineThread
from kvmesh.worker.transfer import Importer
from tests.unit.worker.fakes import MemoryStore, job

POOL = ThreadPoolExecutor(1)


@cache
def profile(step: float = 1e-3) -> Profile:
    """Of KV like the fake model's: integers of 20 bits, the same in a token's every element."""
    values = np.random.default_rng(0).integers(0, 1 << 15, (1, 1, 300, 1, 1)).astype(np.float32)
    return calibrate([np.broadcast_to(values, (2, 2, 300, 1, 4))], bytes(32), [Recipe((step,)), Recipe((4 * step,))])


async def publish(store: MemoryStore, work: Job, codec: Codec) -> tuple[int, str]:
    async with EngineThread(fake_engine(blocks=256)) as thread:
        events = thread.subscribe(work.request_id)
        await thread.add(work.engine_request(load_kv=True, prefill_only=True))
        chunks = range(len(work.chunks))
        async with Publication(store, POOL, work.ticket, chunks, dtype="float32", codec=codec) as publication:
            await thread.start(work.request_id, 0, publication.ranges)
            last = False
            while not last:
                for event in await events.get():
                    last |= isinstance(event, TokenOutput) and event.last
                    if isinstance(event, KvReady):
                        publication.offer(event)
            return await publication.finish(30.0)


async def fetch(store: MemoryStore, work: Job, codec: Codec) -> tuple[int, str]:
    async with EngineThread(fake_engine(blocks=256)) as thread:
        events = thread.subscribe(work.request_id)
        await thread.add(work.engine_request(load_kv=True))
        (admitted,) = await events.get()
        assert isinstance(admitted, Admitted)
        imported = await Importer(store, thread, POOL, codec=codec).fetch(work.request_id, work.ticket, work.chunks, 0)
        await thread.start(work.request_id, imported.end)
        last = False
        while not last:
            last = any(isinstance(event, TokenOutput) and event.last for event in await events.get())
        return imported.end, imported.reason


@pytest.mark.parametrize("codec", [Int8(), CacheGen(profile(), 1)], ids=lambda codec: codec.format.name)
async def test_chunks_travel_encoded(codec):
    store, work = MemoryStore(), job(1000)
    assert await publish(store, work, codec) == (4, "")
    assert await fetch(store, work, codec) == (1000, "")
    exact = MemoryStore()
    await publish(exact, work, Raw())
    assert sum(map(len, store.chunks.values())) < sum(map(len, exact.chunks.values()))


@pytest.mark.parametrize(
    ("there", "here", "reason"),
    [
        (Raw(), Int8(), "encoded by raw where int8 is due"),
        (Int8(), Raw(), "encoded by int8 where raw is due"),
        (CacheGen(profile(), 2), CacheGen(profile(), 1), "level 2 where 1 and 1 are due"),
        (CacheGen(profile(2e-3), 1), CacheGen(profile(), 1), "made with the profile"),
    ],
)
async def test_what_was_encoded_otherwise_is_a_miss(there, here, reason):
    store, work = MemoryStore(), job(600)
    assert await publish(store, work, there) == (3, "")
    end, why = await fetch(store, work, here)
    assert end == 0
    assert reason in why


def test_lossy_kv_has_a_namespace_of_its_own():
    exact, lossy = (load_model(WorkerConfig(model="fake", codec=codec))[0] for codec in ("raw", "int8"))
    assert "codec" not in exact.layout
    assert lossy.layout["codec"] == lossy.codec.namespace
    assert exact.fingerprint != lossy.fingerprint


def test_what_cannot_be_had_is_said_before_anything_is_served():
    with pytest.raises(ValidationError, match="zstd"):
        WorkerConfig(model="fake", codec="zstd")
    with pytest.raises(NotFound, match="kvmesh kv calibrate"):
        load_model(WorkerConfig(model="fake", codec="cachegen"))
