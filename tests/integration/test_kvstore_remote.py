"""The remote tier against a real server, single and as a cluster of one node: expendable, bounded, never in the way."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from kvmesh import redis_server
from kvmesh.kv.bitstream import encode, read_header
from kvmesh.rpc.stream import unary
from kvmesh.types import CHUNK_TOKENS
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as grpc_pb
from kvmesh_kvstore.chunks import Entry, Offer, Tier, Traits
from kvmesh_kvstore.label import pack
from kvmesh_kvstore.remote import BUCKETS, RemoteTier, connect
from tests.integration.stores import CHUNK, Stores, assert_clean, bitstream, eventually, fill, ticket_for

BITS = encode(np.arange(16, dtype="<f4").reshape(1, 2, 2, 1, 4), "float32", 0)


@pytest.fixture(scope="module", params=["redis", "redis+cluster"])
def server(request, tmp_path_factory) -> Iterator[str]:
    """The URL of a server that is only there for blobs."""
    if request.param == "redis":
        with redis_server.start() as single:
            yield single.url
        return
    port, folder = _free_port(), tmp_path_factory.mktemp("cluster")
    command = [*redis_server.command(port, folder), "--cluster-enabled", "yes"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        asyncio.run(_make_cluster(port))
        yield f"redis+cluster://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    """One whose cluster bus port, 10,000 higher, exists too."""
    while (port := redis_server._free_port()) > 55_000:
        pass
    return port


async def _make_cluster(port: int) -> None:
    client = Redis(port=port)
    async with asyncio.timeout(20):
        assigned = False
        while not assigned or (await client.execute_command("CLUSTER INFO"))["cluster_state"] != "ok":
            await asyncio.sleep(0.05)
            with suppress(RedisError):
                assigned = assigned or bool(await client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383))
    await client.aclose()


@pytest.fixture
async def redis_client(server) -> AsyncIterator[object]:
    client = connect(server, 5.0)
    await client.flushall()
    yield client
    await client.aclose()


def tier(client, budget: int = 1 << 20, **settings) -> RemoteTier:
    return RemoteTier(client, budget, timeout=5.0, **settings)


def offer(i: int, bucket: int = 3) -> Offer:
    return Offer(bytes([bucket, i]) + bytes(30), "f", len(BITS), b"p" * 32, tenant=b"t" * 16)


SIZE = len(pack(offer(0))) + len(BITS)


async def test_a_blob_comes_back_with_what_it_came_with(redis_client):
    remote = tier(redis_client)
    assert await remote.get(offer(1).key) is None
    for bucket in range(2 * BUCKETS):
        await remote.put(offer(1, bucket), BITS, hot=False)
    keys = [offer(1, bucket).key for bucket in range(2 * BUCKETS)]
    assert await remote.find([*keys, b"x" * 32]) == set(keys)
    assert await remote.get(keys[5]) == (offer(1, 5), BITS)
    assert await remote.usage() == (2 * BUCKETS, 2 * BUCKETS * SIZE)
    assert await remote.delete(keys[5])
    assert not await remote.delete(keys[5])
    assert await remote.clear() == 2 * BUCKETS - 1
    assert await remote.usage() == (0, 0)
    assert await remote.find(keys) == set()
    assert remote.counters.errors == 0


async def test_each_bucket_keeps_to_its_budget_and_the_least_recently_used_goes(redis_client):
    remote = tier(redis_client, BUCKETS * 3 * SIZE)
    for i in range(3):
        await remote.put(offer(i), BITS, hot=True)
        await asyncio.sleep(0.002)
    await remote.get(offer(0).key)
    await asyncio.sleep(0.002)
    await remote.put(offer(3), BITS, hot=True)
    assert await remote.find([offer(i).key for i in range(4)]) == {offer(i).key for i in (0, 2, 3)}
    assert await remote.usage() == (3, 3 * SIZE)
    assert (remote.counters.admissions, remote.counters.evictions) == (4, 1)


async def test_putting_again_is_counted_once(redis_client):
    remote = tier(redis_client)
    for _ in range(3):
        await remote.put(offer(1), BITS, hot=False)
    assert await remote.usage() == (1, SIZE)


async def test_what_was_seen_once_drives_nothing_out(redis_client):
    remote = tier(redis_client, BUCKETS * SIZE)
    await remote.put(offer(1), BITS, hot=False)
    await remote.put(offer(2), BITS, hot=False)
    assert await remote.find([offer(1).key, offer(2).key]) == {offer(1).key}
    assert remote.counters.refused == 1
    await remote.put(offer(3), BITS, hot=True)
    assert await remote.find([offer(i).key for i in (1, 2, 3)]) == {offer(3).key}


async def test_a_tenant_gives_of_its_own_before_it_exceeds_its_quota(redis_client):
    remote = tier(redis_client, BUCKETS * 10 * SIZE, quota=BUCKETS * 2 * SIZE)
    other = replace(offer(9), tenant=b"o" * 16)
    for each in (other, offer(1), offer(2)):
        await remote.put(each, BITS, hot=False)
        await asyncio.sleep(0.002)
    await remote.put(offer(3), BITS, hot=False)
    assert remote.counters.refused == 1
    await remote.put(offer(3), BITS, hot=True)
    keys = [offer(i).key for i in (1, 2, 3, 9)]
    assert await remote.find(keys) == set(keys[1:])
    assert await remote.usage() == (3, 3 * SIZE)
    await remote.delete(offer(2).key)
    await remote.put(offer(1), BITS, hot=False)
    assert await remote.find(keys) == {keys[0], *keys[2:]}
    assert (remote.counters.refused, remote.counters.evictions) == (1, 1)


async def test_the_ledger_is_empty_when_nothing_is_there(redis_client):
    remote = tier(redis_client, quota=1 << 18)
    for i in (1, 1, 2):
        await remote.put(offer(i), BITS, hot=True)
    await remote.clear()
    left = [name async for name in redis_client.scan_iter(match="kvmesh:*")]
    assert [await redis_client.get(name) for name in left] == [b"0"]


async def test_what_nobody_reads_expires_and_its_bytes_with_it(redis_client):
    remote = tier(redis_client, ttl=0.05)
    await remote.put(offer(1), BITS, hot=True)
    await eventually(lambda: _lacks(remote, offer(1).key))
    await remote.put(offer(2), BITS, hot=True)
    assert await remote.usage() == (1, SIZE)


async def _lacks(remote: RemoteTier, key: bytes) -> bool:
    return not await remote.find([key])


async def test_a_damaged_label_is_a_miss_and_goes(redis_client):
    remote = tier(redis_client)
    await remote.put(offer(1), BITS, hot=True)
    [name] = [name async for name in redis_client.scan_iter(match="*:blob:*")]
    await redis_client.set(name, b"rubbish")
    assert await remote.get(offer(1).key) is None
    assert remote.counters.errors == 1
    assert await remote.usage() == (0, 0)


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_a_tier_that_is_away_costs_one_time_limit_and_is_then_left_alone(scheme):
    remote = RemoteTier(connect(f"{scheme}://127.0.0.1:1/0"), 1 << 20, timeout=0.2)
    began = time.monotonic()
    for _ in range(100):
        assert await remote.get(offer(1).key) is None
        assert await remote.find([offer(1).key]) == set()
    assert time.monotonic() - began < 2.0
    assert remote.counters.errors == 200
    entry = Entry(offer(1), Traits.of(read_header(BITS), len(BITS)), 1, Tier.MEMORY)
    assert not remote.wants(entry)
    await remote.close()


async def test_a_tier_that_does_not_answer_costs_one_time_limit():
    listener = await asyncio.start_server(lambda reader, writer: asyncio.Event().wait(), "127.0.0.1")
    port = listener.sockets[0].getsockname()[1]
    remote = RemoteTier(connect(f"redis://127.0.0.1:{port}/0"), 1 << 20, timeout=0.2)
    async with asyncio.timeout(5.0):
        assert [await remote.get(offer(1).key) for _ in range(100)] == [None] * 100
    await remote.close()
    listener.close()


async def test_what_comes_faster_than_it_can_be_written_is_dropped_and_counted(redis_client):
    remote = tier(redis_client, 1 << 40)
    large = bytes(30 << 20)
    for i in range(4):
        remote.offer(offer(i), large, hot=True)
    assert remote.counters.dropped == 2


# Beneath a store


@pytest.fixture
def mesh(kvstores: Stores) -> Stores:
    return kvstores


async def test_what_a_store_lets_go_is_found_again(mesh, server, redis_client):
    settings = {"memory_bytes": 2 * CHUNK, "blob_url": server, "blob_timeout": 5.0}
    store = await mesh.start(**settings)
    first, second = (ticket_for(store, salt=salt) for salt in "ab")
    sent = await fill(mesh, first)
    await mesh.client.release(first)
    await fill(mesh, second)
    await mesh.client.release(second)
    assert not any(store.vault.store.peek(chunk.key) for chunk in first.chunks)
    await eventually(lambda: _in_remote(store, 2))
    await mesh.client.acquire(first)
    assert await mesh.client.find_missing(first, first.chunks) == set()
    assert await mesh.get(first) == sent
    assert store.vault.store.counters.misses == 0
    await store.vault.settle()
    assert any(store.vault.store.peek(chunk.key) for chunk in first.chunks)
    await mesh.client.release(first)
    # Another store finds it too: the tier is shared.
    await mesh.kill("store")
    heir = await mesh.start("heir", **settings)
    assert await mesh.get(ticket_for(heir, salt="a")) == sent
    reading = await unary(_admin(mesh, heir).GetTiers(pb.GetTiersRequest()))
    found = {t.tier: (t.hits, t.misses, t.read_bytes) for t in reading.tiers}
    assert found == {pb.CHUNK_TIER_MEMORY: (0, 2, 0), pb.CHUNK_TIER_REMOTE: (2, 0, sum(map(len, sent)))}
    await heir.vault.settle()
    evicted = await unary(_admin(mesh, heir).EvictChunks(pb.EvictChunksRequest(all=True)))
    assert evicted.evicted >= 4
    assert await heir.vault.remote.usage() == (0, 0)
    await assert_clean(heir, chunks=0)


async def test_a_store_that_leaves_saves_what_is_wanted(mesh, server, redis_client):
    settings = {"memory_bytes": 1 << 20, "blob_url": server, "blob_timeout": 5.0}
    store = await mesh.start(**settings)
    wanted, once = (ticket_for(store, salt=salt) for salt in "ab")
    sent = await fill(mesh, wanted)
    await fill(mesh, once)
    again = replace(wanted, lease_id="another")
    await mesh.client.acquire(again)
    await mesh.client.find_missing(again, again.chunks)
    await store.drain(5.0)
    await mesh.kill("store")
    heir = await mesh.start("heir", **settings)
    assert await mesh.get(ticket_for(heir, salt="a")) == sent
    assert await mesh.get(ticket_for(heir, salt="b")) == [None, None]


async def _in_remote(store, chunks: int) -> bool:
    return (await store.vault.remote.usage())[0] == chunks


def _admin(mesh: Stores, store) -> grpc_pb.StoreAdminServiceAsyncStub:
    return grpc_pb.StoreAdminServiceStub(mesh.channels.get(store.info.address))


async def test_a_damaged_blob_is_a_counted_miss(mesh, server, redis_client):
    store = await mesh.start(memory_bytes=CHUNK, blob_url=server, blob_timeout=5.0)
    ticket = ticket_for(store, tokens=CHUNK_TOKENS)
    whole = bitstream(0)
    damaged = whole[:-1] + b"\xff"
    remote = store.vault.remote
    await remote.put(Offer(ticket.chunks[0].key, "f", len(whole)), damaged, hot=True)
    assert await mesh.get(ticket) == [None]
    assert (store.vault.store.counters.misses, remote.counters.errors) == (1, 1)
    assert await remote.usage() == (0, 0)


async def test_a_store_serves_on_without_its_remote_tier(mesh):
    store = await mesh.start(memory_bytes=2 * CHUNK, blob_url="redis://127.0.0.1:1/0", blob_timeout=0.1)
    for salt in "abc":
        ticket = ticket_for(store, salt=salt)
        sent = await fill(mesh, ticket)
        assert await mesh.get(ticket) == sent
        await mesh.client.release(ticket)
    assert await mesh.get(ticket_for(store, salt="a")) == [None, None]
    await assert_clean(store, chunks=2)
