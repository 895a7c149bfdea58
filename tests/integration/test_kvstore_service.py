"""The kvstore over real gRPC with a real Redis-protocol server: every promise of its contract, and how to break it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
import pytest

from kvmesh import redis_server
from kvmesh.errors import InvalidArgument, NotFound, Unavailable
from kvmesh.kv.bitstream import decode
from kvmesh.rpc.stream import stream, unary
from kvmesh.types import CHUNK_TOKENS, KvTicket, Role
from kvmesh.v1 import common_pb2, common_pb2_grpc
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as grpc_pb
from kvmesh_kvstore.process import KvStoreProcess
from tests.integration.stores import CHUNK, Stores, assert_clean, bitstream, eventually, fill, ticket_for


@pytest.fixture
def mesh(kvstores: Stores) -> Stores:
    return kvstores


async def put_raw(mesh: Stores, process: KvStoreProcess, *requests: pb.PutChunksRequest) -> pb.PutChunksResponse:
    return await unary(mesh.stub(process).PutChunks(iter(requests), timeout=5.0))


def header(key: bytes = b"k" * 32, size: int = 5, **fields) -> pb.PutChunksRequest:
    return pb.PutChunksRequest(header=pb.PutChunkHeader(key=key, fingerprint="f", size=size, **fields))


def data(content: bytes) -> pb.PutChunksRequest:
    return pb.PutChunksRequest(data=content)


# What it promises


async def test_put_find_get_release(mesh):
    stores = [await mesh.start(f"store-{i}") for i in range(2)]
    ticket = ticket_for(*stores, tokens=3 * CHUNK_TOKENS + 7)
    assert await mesh.client.acquire(ticket) == {chunk.source for chunk in ticket.chunks}
    assert await mesh.client.find_missing(ticket, ticket.chunks) == {chunk.key for chunk in ticket.chunks}
    sent = await fill(mesh, ticket)
    assert await mesh.client.find_missing(ticket, ticket.chunks) == set()
    assert await mesh.get(ticket) == sent
    assert decode(sent[1]).data[0, 0, 0, 0, 0] == 1
    assert await mesh.client.renew(ticket) == {chunk.source for chunk in ticket.chunks}
    await mesh.client.release(ticket)
    await mesh.client.release(ticket)
    assert await mesh.client.renew(ticket) == frozenset()
    # The tail went with its lease, the others stay for whoever has the same prefix.
    assert await mesh.get(ticket) == [*sent[:-1], None]
    for store in stores:
        await assert_clean(store)
    assert sum(len(store.vault.store) for store in stores) == 3


async def test_putting_twice_stores_once(mesh):
    store = await mesh.start()
    ticket = ticket_for(store)
    await mesh.client.acquire(ticket)
    assert all(await asyncio.gather(*(mesh.client.put(ticket, 0, bitstream(0), timeout=5.0) for _ in range(8))))
    assert len(store.vault.store) == 1
    again = await put_raw(mesh, store, header(ticket.chunks[0].key, CHUNK), data(bitstream(0)))
    assert [result.status for result in again.results] == [pb.CHUNK_STATUS_EXISTS]
    await mesh.client.release(ticket)
    await assert_clean(store, chunks=1)


async def test_many_chunks_in_one_stream_each_have_their_status(mesh):
    store = await mesh.start(memory_bytes=2 * CHUNK)
    good = bitstream(1)
    damaged = good[:-1] + b"\xff"
    response = await put_raw(
        mesh, store,
        header(b"a" * 32, CHUNK), data(good[:100]), data(good[100:]),
        header(b"b" * 32, CHUNK), data(damaged),
        header(b"c" * 32, 3 * CHUNK), data(good + good), data(good),
        header(b"a" * 32, CHUNK), data(good),
    )  # fmt: skip
    assert [(result.key[:1], result.status) for result in response.results] == [
        (b"a", pb.CHUNK_STATUS_OK),
        (b"b", pb.CHUNK_STATUS_CORRUPT),
        (b"c", pb.CHUNK_STATUS_FULL),
        (b"a", pb.CHUNK_STATUS_EXISTS),
    ]
    await assert_clean(store, chunks=1)


async def test_a_store_full_of_leased_chunks_says_so_and_serves_on(mesh):
    store = await mesh.start(memory_bytes=2 * CHUNK)
    first, second = ticket_for(store, salt="1"), ticket_for(store, salt="2")
    sent = await fill(mesh, first)
    await mesh.client.acquire(second)
    assert not await mesh.client.put(second, 0, bitstream(0), timeout=5.0)
    assert await mesh.get(first) == sent
    await mesh.client.release(first)
    assert await mesh.client.put(second, 0, bitstream(0), timeout=5.0)
    await mesh.client.release(second)
    await assert_clean(store, chunks=2)


async def test_leases_end_by_themselves_and_take_their_tails(mesh):
    store = await mesh.start()
    ticket = ticket_for(store, tokens=CHUNK_TOKENS + 1, ttl=0.2)
    await mesh.client.acquire(ticket)
    await mesh.client.put(ticket, 0, bitstream(0), timeout=5.0)
    await mesh.client.put(ticket, 1, bitstream(1, 1), timeout=5.0)
    await eventually(lambda: len(store.vault.store.leases) == 0)
    await assert_clean(store, chunks=1)
    assert not await mesh.client.put(ticket, 1, bitstream(1, 1), timeout=5.0)
    assert await mesh.client.find_missing(ticket, ticket.chunks) == {chunk.key for chunk in ticket.chunks}


async def test_lease_times_are_bounded(mesh):
    stub = mesh.stub(await mesh.start())
    granted = await stub.AcquireLease(pb.AcquireLeaseRequest(lease_id="a", ttl_ms=10**9))
    assert granted.ttl_ms == (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).max_lease_ttl_ms == 120_000
    for request in (
        pb.AcquireLeaseRequest(lease_id="", ttl_ms=1),
        pb.AcquireLeaseRequest(lease_id="x" * 129, ttl_ms=1),
        pb.AcquireLeaseRequest(lease_id="a", ttl_ms=0),
    ):
        with pytest.raises(InvalidArgument):
            await unary(stub.AcquireLease(request))
    with pytest.raises(NotFound):
        await unary(stub.RenewLease(pb.RenewLeaseRequest(lease_id="unknown", ttl_ms=5)))
    assert not (await stub.ReleaseLease(pb.ReleaseLeaseRequest(lease_id="unknown"))).released


# Bad input


@pytest.mark.parametrize(
    ("requests", "says"),
    [
        ([data(b"x")], "before a header"),
        ([header(), header()], "ahead of it"),
        ([header(), data(b"123456")], "beyond the size"),
        ([header(), data(b"123")], "before the chunk is whole"),
        ([header(), data(b"")], "data"),
        ([header(b"short")], "key"),
        ([header(size=1 << 40)], "size"),
        ([header(parent_key=b"x")], "parent_key"),
        ([header(tail=True)], "lease_id"),
        ([header(size=2 << 20), data(bytes((1 << 20) + 1))], "data"),
    ],
)
async def test_malformed_puts_are_refused_and_leave_nothing(mesh, requests, says):
    store = await mesh.start()
    with pytest.raises(InvalidArgument, match=says):
        await put_raw(mesh, store, *requests)
    await assert_clean(store, chunks=0)


async def test_a_put_without_its_lease(mesh):
    store = await mesh.start()
    request = header()
    request.lease_id = "unknown"
    with pytest.raises(NotFound):
        await put_raw(mesh, store, request, data(b"12345"))
    await assert_clean(store, chunks=0)


async def test_keys_are_checked(mesh):
    store = await mesh.start()
    source = grpc_pb.ChunkSourceServiceStub(mesh.channels.get(store.info.address))
    for keys in ([b"x"], [b"k" * 32] * 4097):
        with pytest.raises(InvalidArgument):
            await unary(mesh.stub(store).FindMissingChunks(pb.FindMissingChunksRequest(keys=keys)))
        with pytest.raises(InvalidArgument):
            async with stream(source.GetChunks(pb.GetChunksRequest(keys=keys))) as call:
                await call.read()


async def test_a_put_cancelled_midway_leaves_nothing(mesh, tmp_path):
    store = await mesh.start(memory_bytes=0, disk_bytes=4 * CHUNK, disk_path=tmp_path)
    arrived = asyncio.Event()

    async def half() -> AsyncIterator[pb.PutChunksRequest]:
        yield header(size=CHUNK)
        yield data(bitstream(0)[:-1])
        arrived.set()
        await asyncio.Event().wait()

    async with stream(mesh.stub(store).PutChunks(half())) as call:
        await arrived.wait()
        call.cancel()
    await unary(mesh.stub(store).GetCapabilities(pb.GetCapabilitiesRequest()))
    await assert_clean(store, chunks=0)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"] == []


async def test_a_sender_that_freezes_is_let_go(mesh):
    store = await mesh.start(stall_seconds=0.1)

    async def frozen() -> AsyncIterator[pb.PutChunksRequest]:
        yield header()
        await asyncio.Event().wait()

    with pytest.raises(Exception, match="nothing was sent"):
        await unary(mesh.stub(store).PutChunks(frozen(), timeout=10.0))
    await assert_clean(store, chunks=0)


# The disk


async def test_the_disk_takes_what_memory_cannot_and_keeps_it_over_a_restart(mesh, tmp_path):
    settings = {"memory_bytes": 2 * CHUNK, "disk_bytes": 8 * CHUNK, "disk_path": tmp_path}
    async with mesh.running("store", **settings) as store:
        ticket = ticket_for(store, tokens=5 * CHUNK_TOKENS + 3)
        sent = await fill(mesh, ticket)
        assert store.vault.store.disk.used == 3 * CHUNK + len(sent[-1]) or store.vault.store.disk.used >= 3 * CHUNK
        assert await mesh.get(ticket) == sent
        assert await store.vault.check_integrity() == []
        on_disk = {entry.key for entry in store.vault.store.disk if entry.owner is None}
        await store.drain(1.0)
    async with mesh.running("store", **settings) as store:
        assert set(store.vault.store.shared_keys()) == on_disk
        await assert_clean(store)
        again = ticket_for(store, tokens=5 * CHUNK_TOKENS)
        expected = [data if chunk.key in on_disk else None for chunk, data in zip(again.chunks, sent, strict=False)]
        assert await mesh.get(again) == expected
        await assert_clean(store)


async def test_reading_brings_a_chunk_up_to_memory(mesh, tmp_path):
    store = await mesh.start(memory_bytes=CHUNK, disk_bytes=4 * CHUNK, disk_path=tmp_path)
    ticket = ticket_for(store, tokens=3 * CHUNK_TOKENS)
    sent = await fill(mesh, ticket)
    await mesh.client.release(ticket)
    assert await mesh.get(ticket) == sent
    await store.vault.settle()
    assert store.vault.store.counters.promotions > 0
    assert await mesh.get(ticket) == sent
    await assert_clean(store, chunks=3)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink, lambda path: path.write_bytes(b"")])
async def test_a_damaged_file_is_a_counted_miss_and_is_dropped(mesh, tmp_path, harm):
    store = await mesh.start(memory_bytes=0, disk_bytes=4 * CHUNK, disk_path=tmp_path)
    ticket = ticket_for(store)
    sent = await fill(mesh, ticket)
    await mesh.client.release(ticket)
    harm(next(tmp_path.glob(f"*/{ticket.chunks[1].key.hex()}.*")))
    assert await mesh.get(ticket) == [sent[0], None]
    worker = common_pb2_grpc.WorkerServiceStub(mesh.channels.get(store.info.address))
    reading = await worker.GetStatistics(common_pb2.GetStatisticsRequest(check_integrity=True))
    statistics = reading.statistics
    assert (statistics.hits_total, statistics.misses_total, statistics.chunks) == (1, 1, 1)
    assert list(statistics.integrity_errors) == []
    assert store.vault.store.counters.damaged == 1
    await eventually(lambda: matches(mesh, ticket, 1))


async def matches(mesh: Stores, ticket: KvTicket, count: int) -> bool:
    return await mesh.index.match([chunk.key for chunk in ticket.chunks]) == count


async def test_damage_in_memory_is_noticed(mesh):
    store = await mesh.start()
    ticket = ticket_for(store)
    await fill(mesh, ticket)
    await mesh.client.release(ticket)
    memory = store.vault._blobs.memory
    memory[next(iter(memory))] = b"x" * CHUNK
    assert await mesh.get(ticket) == [None, bitstream(1)]
    await assert_clean(store, chunks=1)


async def test_two_stores_do_not_share_a_folder(mesh, tmp_path):
    await mesh.start("one", disk_bytes=CHUNK, disk_path=tmp_path)
    with pytest.raises(Unavailable, match="in use by another"):
        await mesh.start("two", disk_bytes=CHUNK, disk_path=tmp_path)


# Index, registry, events


async def test_the_index_follows_and_the_registry_knows(mesh):
    store = await mesh.start(memory_bytes=2 * CHUNK)
    ticket = ticket_for(store, tokens=2 * CHUNK_TOKENS)
    await fill(mesh, ticket)
    await mesh.client.release(ticket)
    await eventually(lambda: matches(mesh, ticket, 2))
    other = ticket_for(store, salt="other", tokens=CHUNK_TOKENS)
    await fill(mesh, other)
    await eventually(lambda: matches(mesh, ticket, 1))
    [info] = await mesh.registry.list()
    assert (info.role, info.address, info.capacity.memory_bytes) == (Role.KVSTORE, store.info.address, 2 * CHUNK)
    await store.drain(1.0)
    assert await matches(mesh, ticket, 0)
    assert await mesh.registry.list() == []


async def test_watching_and_resuming(mesh):
    store = await mesh.start(memory_bytes=2 * CHUNK)
    async with stream(mesh.stub(store).WatchEvents(pb.WatchEventsRequest())) as call:
        await call.wait_for_connection()
        tickets = [ticket_for(store, salt=str(i), tokens=CHUNK_TOKENS) for i in range(3)]
        for ticket in tickets:
            await fill(mesh, ticket)
            await mesh.client.release(ticket)
        seen = [await call.read() for _ in range(4)]
    keys = [ticket.chunks[0].key for ticket in tickets]
    stored, evicted = pb.CHUNK_EVENT_TYPE_STORED, pb.CHUNK_EVENT_TYPE_EVICTED
    expected = [(1, stored, keys[0]), (2, stored, keys[1]), (3, evicted, keys[0]), (4, stored, keys[2])]
    assert [(event.sequence, event.type, event.key) for event in seen] == expected
    assert {event.epoch for event in seen} == {store.info.epoch}
    async with stream(mesh.stub(store).WatchEvents(pb.WatchEventsRequest(after_sequence=2))) as call:
        assert [(await call.read()).sequence for _ in range(2)] == [3, 4]
    async with stream(mesh.stub(store).WatchEvents(pb.WatchEventsRequest(after_sequence=99))) as call:
        assert (await call.read()).type == pb.CHUNK_EVENT_TYPE_RESET
    await eventually(lambda: store.vault.events.watchers == 0)


async def test_a_drain_ends_watches_and_lets_reads_finish(mesh):
    store = await mesh.start()
    async with stream(mesh.stub(store).WatchEvents(pb.WatchEventsRequest())) as call:
        await call.wait_for_connection()
        await store.drain(5.0)
        assert await call.read() is grpc.aio.EOF


async def test_without_redis_it_serves_and_announces_all_when_redis_is_back(tmp_path):
    with redis_server.start() as first:
        port = first.port
    async with AsyncExitStack() as stack:
        mesh = Stores(first, stack)
        stack.push_async_callback(mesh.channels.close)
        stack.push_async_callback(mesh.registry.close)
        store = await mesh.start(memory_bytes=2 * CHUNK + 1000)
        ticket = ticket_for(store)
        sent = await fill(mesh, ticket)
        await mesh.client.release(ticket)
        assert await mesh.get(ticket) == sent
        other = ticket_for(store, salt="other", tokens=CHUNK_TOKENS)
        await fill(mesh, other)
        await mesh.client.release(other)
        assert await matches(mesh, ticket, 0)
        with redis_server.start(port=port):
            await eventually(lambda: matches(mesh, other, 1))
            assert await matches(mesh, ticket, 1)
            await mesh.registry.redis.flushall()
            third = ticket_for(store, salt="third", tokens=1)
            await fill(mesh, third)
            await mesh.client.release(third)
            await eventually(lambda: matches(mesh, other, 1))
            await store.drain(1.0)
        await assert_clean(store, chunks=2)
