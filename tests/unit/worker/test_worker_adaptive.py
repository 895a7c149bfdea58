"""The adaptive codec in a worker: what it publishes for whom, that on one host nothing is lossy, what it counts."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvmesh.engine.api import KvReady
from kvmesh.errors import NotFound
from kvmesh.kv import bitstream
from kvmesh.kv.codec import INT8, RAW, CorruptChunk, Raw
from kvmesh.kv.codecs.adaptive import Adaptive, Later, member
from kvmesh.kv.codecs.choice import open_codec
from kvmesh.kv.codecs.fp8 import Fp8
from kvmesh.kv.codecs.int8 import Int8
from kvmesh.rpc.address import same_host
from kvmesh.types import ChunkSource, Readers, WorkerStatistics
from kvmesh.v1 import decode_pb2, prefill_pb2
from kvmesh.worker.config import WorkerConfig
from kvmesh.worker.convert import budget_of, readers_of
from kvmesh.worker.job import Coding, Speed
from kvmesh.worker.model import load_model
from kvmesh.worker.publication import Publication
from kvmesh.worker.traffic import Traffic, quality_of
from tests.unit.worker.fakes import MemoryStore, job

POOL = ThreadPoolExecutor(1)
RAW_CODEC, LOSSY = Raw(), Int8()
CODEC = Adaptive((RAW_CODEC, LOSSY), "abc")
DATA = np.linspace(-1, 1, 2 * 2 * 256 * 4, dtype=np.float32).reshape(2, 2, 256, 1, 4)


async def published(readers: Readers, address: str = "host:1") -> int:
    """The codec that a chunk is stored in by a worker at `address`; the store is at `nowhere`."""
    store, work, traffic = MemoryStore(), job(256), Traffic(lambda: address)
    bits = bitstream.encode(DATA, "float32", 0, LOSSY)
    traffic.expect(Speed(0, 0.0, (Coding(bits, 1e-3, 1e-3),)))
    publication = Publication(
        store, POOL, work.ticket, [0], dtype="float32", codec=CODEC, traffic=traffic, readers=readers
    )
    async with publication:
        publication.offer(KvReady("r", 0, DATA))
        assert await publication.finish(5) == (1, "")
    (bits,) = store.chunks.values()
    reading = WorkerStatistics()
    traffic.report(reading)
    assert (reading.published_bytes_total, reading.published_raw_bytes_total) == (len(bits), DATA.nbytes)
    return bitstream.read_header(bits).codec


async def test_chunks_are_raw_where_all_is_on_one_host_and_encoded_where_it_is_not():
    assert await published(Readers(), "nowhere:9") == RAW.id
    assert await published(Readers(), "127.0.0.1:9") == RAW.id
    assert await published(Readers(False, 1.0), "nowhere:9") == RAW.id
    assert await published(Readers(), "elsewhere:9") == INT8.id
    assert await published(Readers(True, 1e3), "nowhere:9") == INT8.id
    assert await published(Readers(True, 1e9), "nowhere:9") == RAW.id


def test_both_kinds_of_bitstream_are_read_and_no_other():
    for codec in (LOSSY, RAW_CODEC):
        bits = bitstream.encode(DATA, "float32", 0, codec)
        found = bitstream.decode(bits, member(CODEC, bitstream.read_header(bits).codec)).data
        assert np.abs(found - DATA).max() < 0.02
    with pytest.raises(CorruptChunk, match="encoded by fp8 where one of raw, int8 is due"):
        member(CODEC, Fp8().format.id)
    assert member(Fp8(), RAW.id).format is Fp8().format


def test_adaptive_kv_shares_no_namespace():
    names = {codec.namespace for codec in (CODEC, LOSSY, RAW_CODEC, Adaptive(CODEC.members, "other"))}
    assert len(names) == 4
    assert CODEC.namespace == "adaptive/1:abc"


def test_without_a_profile_auto_is_raw_and_adaptive_is_refused():
    assert open_codec("auto", (2, 2, 1, 4)).format is RAW
    with pytest.raises(NotFound):
        open_codec("adaptive", (2, 2, 1, 4))
    model, _ = load_model(WorkerConfig(model="fake"))
    assert "codec" not in model.layout


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1:1", "10.0.0.1:2", True),
        ("10.0.0.1:1", "10.0.0.2:1", False),
        ("127.0.0.1:1", "127.0.0.2:1", True),
        ("localhost:1", "host:1", True),
        ("[::1]:1", "host:1", True),
        ("a:1", "b:1", False),
    ],
)
def test_what_is_one_host(one, other, same):
    assert same_host(one, other) == same_host(other, one) == same


def test_a_worker_without_an_address_has_no_remote_source():
    source = ChunkSource("store", "elsewhere:1")
    assert not Traffic().remote(source)
    assert Traffic(lambda: "here:1").remote(source)


def test_qualities_have_names():
    assert (quality_of(RAW.id, 1), quality_of(5, 3)) == ("raw", "transform:3")


@pytest.mark.parametrize(("sent", "read"), [(1.5, 1.5), (-1.0, 0.0), (float("nan"), None), (float("inf"), None)])
def test_a_budget_is_finite_and_not_negative(sent, read):
    assert budget_of(decode_pb2.DecodeRequest(ttft_budget_seconds=sent)) == read
    assert budget_of(decode_pb2.DecodeRequest()) is None


@pytest.mark.parametrize(("sent", "read"), [(2.0, 2.0), (-1.0, 0.0), (float("nan"), 0.0)])
def test_a_readers_throughput_is_finite_and_positive_or_unknown(sent, read):
    request = prefill_pb2.PrefillRequest()
    request.readers.remote, request.readers.bytes_per_second = True, sent
    assert readers_of(request) == Readers(True, read)


def test_a_codec_that_is_made_later_is_made_once_and_then_as_good():
    made = []

    def make() -> Int8:
        made.append(1)
        return Int8()

    later = Adaptive((RAW_CODEC, Later(INT8, "int8", make)), "abc")
    assert (later.namespace, later.format, made) == (CODEC.namespace, INT8, [])
    bits = bitstream.encode(DATA, "float32", 0, member(later, INT8.id))
    assert bits == bitstream.encode(DATA, "float32", 0, LOSSY)
    assert np.abs(bitstream.decode(bits, member(later, INT8.id)).data - DATA).max() < 0.02
    assert made == [1]
