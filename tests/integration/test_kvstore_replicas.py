"""Several stores over real gRPC: replicas that die, stores that join, prefixes of progressive bitstreams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvmesh.errors import InvalidArgument
from kvmesh.kv.bitstream import cut, encode, read_header
from kvmesh.kv.codec import TRANSFORM
from kvmesh.kv.ticket import owners
from kvmesh.rpc.stream import unary
from kvmesh.types import CHUNK_TOKENS
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh_kvstore.pull import Puller
from tests.integration.stores import CHUNK, Stores, assert_clean, bitstream, eventually, fill, ticket_for


@pytest.fixture
def mesh(kvstores: Stores) -> Stores:
    return kvstores


class Layered:
    """Stands for a progressive codec: the store reads of it no more than the header."""

    format = TRANSFORM
    namespace = "layered"

    def encode(self, data, first_layer, start=0):
        return [bytes([i]) * (100 * (i + 1)) for i in range(4)]

    def decode(self, parts, shape, dtype, first_layer):
        raise NotImplementedError


def layered() -> bytes:
    return encode(np.zeros((2, 2, CHUNK_TOKENS, 1, 8), "<f4"), "float32", 0, Layered())


# Quality layers


async def test_a_prefix_of_the_quality_layers(mesh):
    store = await mesh.start()
    ticket = ticket_for(store, tokens=CHUNK_TOKENS)
    whole = layered()
    await mesh.client.acquire(ticket)
    assert await mesh.client.put(ticket, 0, whole, timeout=5.0)
    ends = read_header(whole).layer_ends
    for layers in range(6):
        fetched = await mesh.client.fetch(ticket, ticket.chunks[0], layers=layers, timeout=5.0)
        assert fetched.bits == bytes(cut(whole, layers or 4))
        assert (fetched.layer_ends, fetched.codec) == (ends, TRANSFORM.id)
        assert 0 < fetched.waited <= fetched.seconds
    assert await mesh.get(ticket) == [whole]


async def test_what_is_known_of_chunks_changes_nothing(mesh):
    stores = [await mesh.start(f"store-{i}") for i in range(2)]
    ticket = ticket_for(*stores, tokens=3 * CHUNK_TOKENS, replicas=2)
    await mesh.client.acquire(ticket)
    assert await mesh.client.stat(ticket, ticket.chunks) == {}
    assert await mesh.client.put(ticket, 1, layered(), timeout=5.0)
    stats = await mesh.client.stat(ticket, ticket.chunks)
    assert list(stats) == [ticket.chunks[1].key]
    [stat] = stats.values()
    assert (stat.layer_ends, stat.size) == (read_header(layered()).layer_ends, len(layered()))
    assert (stat.codec, stat.tier, stat.leases) == (TRANSFORM.id, pb.CHUNK_TIER_MEMORY, 1)
    assert stat.source == ticket.chunks[1].source
    await mesh.client.release(ticket)
    assert (await mesh.client.stat(ticket, ticket.chunks))[ticket.chunks[1].key].leases == 0
    await stores[stat.source].drain(0.1)
    assert (await mesh.client.stat(ticket, ticket.chunks))[ticket.chunks[1].key].source != stat.source


async def test_a_prefix_that_was_put_is_the_whole_that_is_there(mesh):
    store = await mesh.start()
    ticket = ticket_for(store, tokens=CHUNK_TOKENS)
    prefix = bytes(cut(layered(), 2))
    await mesh.client.acquire(ticket)
    assert await mesh.client.put(ticket, 0, prefix, timeout=5.0)
    assert (await mesh.client.fetch(ticket, ticket.chunks[0], layers=4, timeout=5.0)).bits == prefix
    assert (await mesh.client.stat(ticket, ticket.chunks))[ticket.chunks[0].key].layer_ends == (
        read_header(prefix).layer_ends[:2]
    )


async def test_keys_to_be_described_are_checked(mesh):
    stub = mesh.stub(await mesh.start())
    for keys in ([b"x"], [b"k" * 32] * 4097):
        with pytest.raises(InvalidArgument):
            await unary(stub.StatChunks(pb.StatChunksRequest(keys=keys)))


# Replicas


async def test_each_chunk_rests_at_its_owners_and_survives_one(mesh):
    stores = [await mesh.start(f"store-{i}", memory_bytes=1 << 20) for i in range(3)]
    ticket = ticket_for(*stores, tokens=6 * CHUNK_TOKENS + 5, replicas=2)
    sent = await fill(mesh, ticket)
    for chunk in ticket.chunks:
        holders = {i for i, store in enumerate(stores) if store.vault.store.peek(chunk.key)}
        assert holders == set(owners(ticket, chunk))
        assert all(stores[i].vault.store.peek(chunk.key).pins == {ticket.lease_id} for i in holders)
    assert mesh.client.missed_replicas == 0
    await mesh.kill("store-0")
    assert await mesh.get(ticket) == sent
    assert await mesh.client.find_missing(ticket, ticket.chunks) == set()
    assert [await mesh.client.fetch(ticket, chunk, timeout=5.0) is not None for chunk in ticket.chunks] == [True] * 7
    await mesh.client.release(ticket)
    for store in stores[1:]:
        await assert_clean(store)
        assert not any(store.vault.store.peek(chunk.key) for chunk in ticket.chunks if chunk.tail)


async def test_a_replica_that_dies_midway_costs_nothing(mesh):
    stores = [await mesh.start(f"store-{i}", memory_bytes=1 << 20) for i in range(3)]
    ticket = ticket_for(*stores, tokens=30 * CHUNK_TOKENS, replicas=2)
    sent = await fill(mesh, ticket)
    found = []
    async for _, content in mesh.client.get(ticket, ticket.chunks, timeout_per_chunk=5.0):
        found.append(content)
        if len(found) == 3:
            await mesh.kill("store-1")
    assert found == sent


async def test_a_put_is_good_if_one_owner_takes_it_and_the_others_are_counted(mesh):
    stores = [await mesh.start(f"store-{i}") for i in range(2)]
    ticket = ticket_for(*stores, replicas=2)
    await mesh.client.acquire(ticket)
    await mesh.kill("store-1")
    assert await mesh.client.put(ticket, 0, bitstream(0), timeout=5.0)
    assert mesh.client.missed_replicas == 1
    await mesh.kill("store-0")
    assert not await mesh.client.put(ticket, 1, bitstream(1), timeout=5.0)


# Joining


async def test_what_a_newcomer_wins_is_found_where_it_was_put(mesh):
    stores = [await mesh.start(f"store-{i}", memory_bytes=1 << 20) for i in range(2)]
    before = ticket_for(*stores, tokens=20 * CHUNK_TOKENS)
    sent = await fill(mesh, before)
    await mesh.client.release(before)
    stores.append(await mesh.start("store-2", memory_bytes=1 << 20))
    after = ticket_for(*stores, tokens=20 * CHUNK_TOKENS)
    moved = [chunk for old, chunk in zip(before.chunks, after.chunks, strict=True) if chunk.source != old.source]
    assert moved
    assert {chunk.source for chunk in moved} == {2}
    await mesh.client.acquire(after)
    assert await mesh.client.find_missing(after, after.chunks) == set()
    assert await mesh.get(after) == sent
    assert await mesh.client.stat(after, after.chunks) != {}
    assert (await mesh.client.fetch(after, moved[0], timeout=5.0)).bits == sent[after.chunks.index(moved[0])]


async def test_a_newcomer_copies_what_it_won_and_is_wanted_and_nothing_else(mesh):
    settings = {"memory_bytes": 1 << 20, "pull_delay": 0.01}
    stores = [await mesh.start(f"store-{i}", **settings) for i in range(2)]
    before = ticket_for(*stores, tokens=20 * CHUNK_TOKENS + 9)
    sent = await fill(mesh, before)
    again = replace(before, lease_id="another")
    await mesh.client.acquire(again)
    await mesh.client.find_missing(again, again.chunks[:12])
    stores.append(await mesh.start("store-2", **settings))
    after = ticket_for(*stores, tokens=20 * CHUNK_TOKENS)
    due = {chunk.key for chunk in after.chunks[:12] if chunk.source == 2}
    assert due
    await eventually(lambda: {entry.key for entry in stores[2].vault.store} == due)
    for index, chunk in enumerate(after.chunks):
        if chunk.key in due:
            assert (await mesh.client.fetch(after, chunk, timeout=5.0)).source == 2
            owners_ = (stores[2], stores[before.chunks[index].source])
            taken, original = (store.vault.store.peek(chunk.key) for store in owners_)
            assert (taken.offer, taken.traits, taken.hot) == (original.offer, original.traits, True)
    assert (await mesh.get(after))[:12] == sent[:12]
    await assert_clean(stores[2], chunks=len(due))


async def test_a_lost_replica_is_made_good(mesh):
    settings = {"memory_bytes": 1 << 20, "pull_delay": 0.01, "replicas": 2}
    stores = [await mesh.start(f"store-{i}", **settings) for i in range(3)]
    ticket = ticket_for(*stores, tokens=12 * CHUNK_TOKENS, replicas=2)
    sent = await fill(mesh, ticket)
    again = replace(ticket, lease_id="another")
    await mesh.client.acquire(again)
    await mesh.client.find_missing(again, again.chunks)
    await mesh.kill("store-0")
    keys = {chunk.key for chunk in ticket.chunks}
    await eventually(lambda: all({entry.key for entry in store.vault.store} == keys for store in stores[1:]))
    await mesh.kill("store-1")
    assert await mesh.get(ticket) == sent


async def test_a_full_newcomer_evicts_nothing_for_copies(mesh):
    store = await mesh.start("store-0", memory_bytes=1 << 20, pull_rate=0)
    ticket = ticket_for(store, tokens=12 * CHUNK_TOKENS)
    await fill(mesh, ticket)
    again = replace(ticket, lease_id="another")
    await mesh.client.acquire(again)
    await mesh.client.find_missing(again, again.chunks)
    small = await mesh.start("store-1", memory_bytes=2 * CHUNK, pull_rate=0)
    puller = Puller(small.vault, mesh.channels, "store-1", replicas=2, rate=1e12)
    assert await puller.pull([store.info, small.info]) == 2
    assert await puller.pull([store.info, small.info]) == 0
    assert {entry.key for entry in small.vault.store} == {chunk.key for chunk in ticket.chunks[:2]}
    assert small.vault.store.memory.counters.evictions == 0
    await mesh.kill("store-0")
    assert await puller.pull([store.info, small.info]) == 0
