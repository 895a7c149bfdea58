"""What operators ask of stores, over real gRPC and from the command line."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import grpc.aio
import pytest

from kvmesh.errors import InvalidArgument
from kvmesh.kv.admin import Filter, StoreAdmin
from kvmesh.kv.keys import tenant_of
from kvmesh.rpc.stream import stream, unary
from kvmesh.types import CHUNK_TOKENS
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as grpc_pb
from kvmesh_kvstore.process import KvStoreProcess
from tests.integration.stores import CHUNK, Stores, assert_clean, bitstream, fill, ticket_for


@pytest.fixture
def mesh(kvstores: Stores) -> Stores:
    return kvstores


def admin(mesh: Stores, *stores: KvStoreProcess) -> StoreAdmin:
    return StoreAdmin(mesh.channels, [store.info for store in stores])


def stub(mesh: Stores, store: KvStoreProcess) -> grpc_pb.StoreAdminServiceAsyncStub:
    return grpc_pb.StoreAdminServiceStub(mesh.channels.get(store.info.address))


def no_report(name: str, done: int, total: int) -> None: ...


async def kvmesh(mesh: Stores, *arguments: str, tmp_path) -> tuple[int, str, str]:
    """The command in a process of its own; the store serves meanwhile."""
    command = [sys.executable, "-c", "from kvmesh.cli.main import main; main()", "kv", *arguments]
    given = {"PYTHONPATH": ":".join(sys.path), "KVMESH_REDIS_URL": mesh.redis_url, "XDG_STATE_HOME": str(tmp_path)}
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **given}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def test_a_reading_adds_up(mesh):
    store = await mesh.start(memory_bytes=3 * CHUNK)
    tickets = [ticket_for(store, salt=salt) for salt in ("a", "b")]
    for ticket in tickets:
        await fill(mesh, ticket)
        await mesh.client.release(ticket)
    await mesh.get(tickets[1])
    await mesh.get(tickets[0])
    reading = (await admin(mesh, store).tiers())["store"]
    [tier] = reading.tiers
    assert (tier.chunks, tier.used_bytes, tier.budget_bytes) == (3, 3 * CHUNK, 3 * CHUNK)
    assert (tier.hits, tier.misses, tier.read_bytes) == (3, 1, 3 * CHUNK)
    assert (tier.admissions, tier.evictions) == (4, 1)
    assert (reading.hits, reading.misses, reading.damaged) == (3, 1, 0)
    assert {t.tenant: t.chunks for t in reading.tenants} == {tenant_of("a"): 1, tenant_of("b"): 2}
    assert sum(t.used_bytes for t in reading.tenants) == tier.used_bytes
    assert dict(reading.chunks_by_quality) == {"raw": 3}
    assert 0 < reading.raw_bytes < tier.used_bytes


async def test_lists_are_filtered_and_limited(mesh):
    store = await mesh.start(memory_bytes=20 * CHUNK)
    for salt in ("", "b"):
        await fill(mesh, ticket_for(store, salt=salt, tokens=4 * CHUNK_TOKENS + 1))
    ask = admin(mesh, store)
    everything = (await ask.chunks(Filter()))["store"]
    assert (len(everything), sum(chunk.tail for chunk in everything)) == (10, 2)
    assert len((await ask.chunks(Filter(), 3))["store"]) == 3
    assert {c.tenant for c in (await ask.chunks(Filter(tenant=b"")))["store"]} == {b""}
    one = everything[4]
    assert [c.key for c in (await ask.chunks(Filter(key_prefix=one.key.hex()[:16].upper())))["store"]] == [one.key]
    assert (await ask.chunks(Filter(keys=[one.key], tenant=tenant_of("other"))))["store"] == []
    assert len((await ask.chunks(Filter(fingerprint_prefix="f")))["store"]) == 10
    assert (await ask.chunks(Filter(fingerprint_prefix="g")))["store"] == []


async def test_verifying_drops_what_is_damaged_and_nothing_else(mesh, tmp_path):
    store = await mesh.start(memory_bytes=2 * CHUNK, disk_bytes=8 * CHUNK, disk_path=tmp_path)
    ticket = ticket_for(store, tokens=5 * CHUNK_TOKENS)
    await fill(mesh, ticket)
    await mesh.client.release(ticket)
    seen = []
    assert await admin(mesh, store).verify(Filter(), lambda *report: seen.append(report)) == {"store": (5, [])}
    assert seen[-1] == ("store", 5, 5)
    memory = store.vault._blobs.memory
    in_memory = next(entry.key for entry in store.vault.store.memory)
    memory[store.vault.store.peek(in_memory).serial] = b"x" * CHUNK
    on_disk = next(entry.key for entry in store.vault.store.disk)
    file = next(tmp_path.glob(f"*/{on_disk.hex()}.*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xfe")
    count, damaged = (await admin(mesh, store).verify(Filter(), no_report))["store"]
    assert (count, set(damaged)) == (5, {in_memory, on_disk})
    assert await admin(mesh, store).verify(Filter(), no_report) == {"store": (3, [])}
    await assert_clean(store, chunks=3)


async def test_evicting_leaves_what_is_leased_and_its_prefixes(mesh):
    store = await mesh.start(memory_bytes=20 * CHUNK)
    mine, yours = ticket_for(store, tokens=3 * CHUNK_TOKENS), ticket_for(store, salt="b", tokens=3 * CHUNK_TOKENS)
    await fill(mesh, mine)
    await mesh.client.release(mine)
    await mesh.client.acquire(mine)
    await mesh.client.find_missing(mine, mine.chunks[1:2])
    await fill(mesh, yours)
    await mesh.client.release(yours)
    result = (await admin(mesh, store).evict(Filter(), all=True))["store"]
    assert (result.evicted, result.evicted_bytes) == (4, 4 * CHUNK)
    assert set(result.kept_keys) == {chunk.key for chunk in mine.chunks[:2]}
    await mesh.client.release(mine)
    assert (await admin(mesh, store).evict(Filter(keys=[mine.chunks[0].key]), all=False))["store"].evicted == 0
    assert (await admin(mesh, store).evict(Filter(tenant=b""), all=False))["store"].evicted == 2
    await assert_clean(store, chunks=0)


BAD_FILTERS = [
    Filter(keys=[b"short"]),
    Filter(keys=[b"k" * 32] * 4097),
    Filter(key_prefix="xyz"),
    Filter(key_prefix="0" * 65),
    Filter(fingerprint_prefix="f" * 129),
    Filter(tenant=b"short"),
]


@pytest.mark.parametrize("bad", BAD_FILTERS)
async def test_malformed_filters_are_refused_by_every_call(mesh, bad):
    store = await mesh.start()
    ask = stub(mesh, store)
    with pytest.raises(InvalidArgument, match="filter"):
        await unary(ask.EvictChunks(pb.EvictChunksRequest(filter=bad)))
    for call in (
        ask.ListChunks(pb.ListChunksRequest(filter=bad)),
        ask.VerifyChunks(pb.VerifyChunksRequest(filter=bad)),
    ):
        with pytest.raises(InvalidArgument, match="filter"):
            async with stream(call) as opened:
                await opened.read()
    await assert_clean(store, chunks=0)


@pytest.mark.parametrize(
    "method",
    [
        "KvStoreService/StatChunks",
        "StoreAdminService/GetTiers",
        "StoreAdminService/EvictChunks",
        "StoreAdminService/ListChunks",
        "StoreAdminService/VerifyChunks",
        "ChunkSourceService/GetChunks",
    ],
)
async def test_bytes_that_are_no_message(mesh, method):
    store = await mesh.start()
    channel = mesh.channels.get(store.info.address)
    streams = method.rpartition("/")[2] in ("ListChunks", "VerifyChunks", "GetChunks")
    call = (channel.unary_stream if streams else channel.unary_unary)(f"/kvmesh.v1.{method}")(b"\xff" * 40, timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if streams else call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await assert_clean(store, chunks=0)


async def test_nothing_is_evicted_by_mistake(mesh):
    store = await mesh.start()
    ticket = ticket_for(store)
    await fill(mesh, ticket)
    await mesh.client.release(ticket)
    with pytest.raises(InvalidArgument, match="all"):
        await unary(stub(mesh, store).EvictChunks(pb.EvictChunksRequest()))
    await assert_clean(store, chunks=2)


async def test_a_tenant_of_a_wrong_length_cannot_put(mesh):
    store = await mesh.start()
    header = pb.PutChunkHeader(key=b"k" * 32, fingerprint="f", size=5, tenant=b"mine")
    with pytest.raises(InvalidArgument, match="tenant"):
        await unary(mesh.stub(store).PutChunks(iter([pb.PutChunksRequest(header=header)])))


async def test_a_store_that_is_gone_is_named_and_the_others_answer(mesh):
    stores = [await mesh.start(f"store-{i}") for i in range(2)]
    await mesh.kill("store-1")
    ask = admin(mesh, *stores)
    assert set(await ask.tiers()) == {"store-0"}
    assert set(ask.silent) == {"store-1"}


async def test_a_tenant_that_floods_displaces_its_own(mesh):
    store = await mesh.start(memory_bytes=10 * CHUNK, tenant_quota=0.5)
    quiet = ticket_for(store, salt="quiet", tokens=3 * CHUNK_TOKENS)
    await fill(mesh, quiet)
    await mesh.client.release(quiet)
    for i in range(4, 12):
        flood = ticket_for(store, salt="flood", tokens=i * CHUNK_TOKENS)
        await mesh.client.acquire(flood)
        for index in range(len(flood.chunks)):
            await mesh.client.put(flood, index, bitstream(index), timeout=5.0)
        await mesh.client.release(flood)
    assert None not in await mesh.get(quiet)
    reading = (await admin(mesh, store).tiers())["store"]
    assert reading.tenant_quota_bytes == 5 * CHUNK
    assert {t.tenant: t.chunks for t in reading.tenants} == {tenant_of("flood"): 5, tenant_of("quiet"): 3}


# The command line


async def test_the_commands(mesh, tmp_path):
    stores = [await mesh.start(f"store-{i}", memory_bytes=20 * CHUNK) for i in range(3)]
    ticket = ticket_for(*stores, tokens=6 * CHUNK_TOKENS, replicas=2, salt="a")
    await fill(mesh, ticket)
    code, output, _ = await kvmesh(mesh, "stat", tmp_path=tmp_path)
    assert code == 0
    assert all(word in output for word in ("store-0", "store-2", "memory", "raw ×12", tenant_of("a").hex()))
    code, output, _ = await kvmesh(mesh, "stat", "--json", tmp_path=tmp_path)
    assert sum(store["tiers"][0]["chunks"] for store in json.loads(output).values()) == 12
    code, output, _ = await kvmesh(mesh, "ls", "--json", "--limit", "0", tmp_path=tmp_path)
    assert {chunk["key"] for chunk in json.loads(output)} == {chunk.key.hex() for chunk in ticket.chunks}
    code, output, _ = await kvmesh(mesh, "ls", "--prefix", ticket.chunks[0].key.hex()[:20], tmp_path=tmp_path)
    assert output.count(ticket.chunks[0].key.hex()) == 2
    code, output, _ = await kvmesh(mesh, "evict", "--all", "--yes", tmp_path=tmp_path)
    assert (code, output) == (0, "evicted 0 chunks (0 B); 12 are in use and stay\n")
    await mesh.client.release(ticket)
    memory = stores[0].vault._blobs.memory
    memory[next(iter(memory))] = b"x" * CHUNK
    code, output, errors = await kvmesh(mesh, "verify", tmp_path=tmp_path)
    assert (code, output) == (1, "verified 12 chunks in 3 stores\n")
    assert "1 damaged chunks were dropped" in errors
    key = ticket.chunks[-1].key.hex()
    code, output, _ = await kvmesh(mesh, "evict", key, "--yes", "--json", tmp_path=tmp_path)
    assert sum(result["evicted"] for result in json.loads(output).values()) in (
        1,
        2,
    )  # the damaged one may have been it
    code, output, errors = await kvmesh(mesh, "evict", "--tenant", tenant_of("a").hex(), tmp_path=tmp_path)
    assert code == 130  # nobody said yes
    code, output, _ = await kvmesh(mesh, "evict", "--tenant", tenant_of("a").hex(), "--yes", tmp_path=tmp_path)
    assert code == 0
    for store in stores:
        await assert_clean(store, chunks=0)


async def test_what_a_store_refuses_is_one_sentence(mesh, tmp_path):
    await mesh.start()
    code, output, errors = await kvmesh(mesh, "ls", "--prefix", "xyz", tmp_path=tmp_path)
    assert (code, output) == (1, "")
    assert "hexadecimal" in errors
    assert "Traceback" not in errors
