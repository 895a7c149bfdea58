"""Whatever a source does, the client answers for each chunk, in order, in bounded time, and leaves no stream behind."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

import pytest

from kvmesh.kv.client import StoreClient
from kvmesh.kv.ticket import write_ticket
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.server import Service, serve
from kvmesh.types import CHUNK_TOKENS, ChunkSource, KvTicket
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as grpc_pb

OK, MISSING = pb.CHUNK_STATUS_OK, pb.CHUNK_STATUS_MISSING


class Source(grpc_pb.ChunkSourceServiceServicer, grpc_pb.KvStoreServiceServicer):
    """Sends what `chunk` yields for each key; `open` counts its streams."""

    def __init__(self) -> None:
        self.open = 0
        self.sent = 0

    async def GetChunks(self, request, context):
        self.open += 1
        try:
            for key in request.keys:
                async for part in self.chunk(key):
                    yield part
                self.sent += 1
        finally:
            self.open -= 1

    async def chunk(self, key: bytes) -> AsyncIterator[pb.GetChunksResponse]:
        yield header(key, len(key))
        yield data(key[:9])
        yield data(key[9:])


class Stalled(Source):
    async def chunk(self, key):
        yield header(key, len(key))
        await asyncio.Event().wait()

    async def AcquireLease(self, request, context):
        await asyncio.Event().wait()

    async def FindMissingChunks(self, request, context):
        await asyncio.Event().wait()

    async def PutChunks(self, requests, context):
        await asyncio.Event().wait()


class Taker(Source):
    async def PutChunks(self, requests, context):
        return pb.PutChunksResponse(results=[pb.PutChunkResult(status=OK) async for r in requests if r.header.key])


class Scripted(Source):
    """The same parts for every chunk, whatever was asked."""

    def __init__(self, *parts) -> None:
        super().__init__()
        self.parts = parts

    async def chunk(self, key):
        for part in self.parts:
            yield part(key)


class Owner(Source):
    """Has those chunks of `ticket` that its number owns, no others."""

    ticket: KvTicket
    number = 0

    async def chunk(self, key):
        if next(chunk for chunk in self.ticket.chunks if chunk.key == key).source != self.number:
            yield header(key, 0, MISSING)
            return
        async for part in super().chunk(key):
            yield part


def header(key: bytes, size: int, status: int = OK) -> pb.GetChunksResponse:
    return pb.GetChunksResponse(header=pb.GetChunkHeader(key=key, status=status, size=size))


def data(content: bytes) -> pb.GetChunksResponse:
    return pb.GetChunksResponse(data=content)


class Mesh:
    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.channels = ChannelPool()
        self.client = StoreClient(self.channels, timeout=0.5, max_chunk_bytes=1000)

    async def start(self, source: Source, name: str) -> ChunkSource:
        def add(server) -> None:
            grpc_pb.add_ChunkSourceServiceServicer_to_server(source, server)
            grpc_pb.add_KvStoreServiceServicer_to_server(source, server)

        services = [Service("kvmesh.v1.ChunkSourceService", add)]
        server = await self._stack.enter_async_context(serve(host="127.0.0.1", port=0, services=services))
        return ChunkSource(name, server.address)

    async def get(self, ticket: KvTicket, timeout: float = 5.0) -> list[bytes | None]:
        async with aclosing(self.client.get(ticket, ticket.chunks, timeout_per_chunk=timeout)) as chunks:
            found = [(chunk, content) async for chunk, content in chunks]
        assert [chunk for chunk, _ in found] == [*ticket.chunks]
        return [content for _, content in found]


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        stack.push_async_callback(mesh.channels.close)
        yield mesh


def ticket_for(*sources: ChunkSource, chunks: int = 12) -> KvTicket:
    return write_ticket(
        fingerprint="f",
        salt="",
        tokens=range(chunks * CHUNK_TOKENS),
        layers=(0, 1),
        sources=sources,
        lease_id="lease",
        ttl_ms=1000,
    )


def only(ticket: KvTicket, source: int) -> list[bytes | None]:
    return [chunk.key if chunk.source == source else None for chunk in ticket.chunks]


async def test_chunks_of_several_sources_come_in_token_order(mesh):
    ticket = ticket_for(*[await mesh.start(Source(), f"s{i}") for i in range(3)])
    assert {chunk.source for chunk in ticket.chunks} == {0, 1, 2}
    assert await mesh.get(ticket) == [chunk.key for chunk in ticket.chunks]


async def test_a_dead_source_costs_what_it_alone_holds(mesh):
    owner = Owner()
    owner.ticket = ticket = ticket_for(await mesh.start(owner, "good"), ChunkSource("dead", "127.0.0.1:1"))
    assert await mesh.get(ticket) == only(ticket, 0)
    assert None in await mesh.get(ticket)


async def test_a_stalled_source_costs_what_it_alone_holds_and_its_stream_is_cancelled(mesh):
    owner, stalled = Owner(), Stalled()
    owner.ticket = ticket = ticket_for(await mesh.start(owner, "good"), await mesh.start(stalled, "stalled"))
    assert await mesh.get(ticket, timeout=0.3) == only(ticket, 0)
    async with asyncio.timeout(10.0):
        while stalled.open:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "other", [ChunkSource("dead", "127.0.0.1:1"), Stalled(), Scripted(), Scripted(lambda k: data(k))]
)
async def test_whatever_a_source_does_the_next_is_asked(mesh, other):
    other = other if isinstance(other, ChunkSource) else await mesh.start(other, "other")
    ticket = ticket_for(other, await mesh.start(Source(), "good"))
    assert await mesh.get(ticket, timeout=0.3) == [chunk.key for chunk in ticket.chunks]
    for chunk in ticket.chunks[:3]:
        fetched = await mesh.client.fetch(ticket, chunk, timeout=1.0)
        assert (fetched.bits, fetched.source) == (chunk.key, 1)


async def test_a_fetch_that_nobody_answers_ends_in_time(mesh):
    ticket = ticket_for(await mesh.start(Stalled(), "one"), await mesh.start(Stalled(), "two"), chunks=1)
    async with asyncio.timeout(10.0):
        assert await mesh.client.fetch(ticket, ticket.chunks[0], timeout=0.2) is None


async def test_a_replica_that_does_not_take_a_chunk_is_not_waited_for(mesh):
    ticket = replace(ticket_for(await mesh.start(Taker(), "one"), await mesh.start(Stalled(), "two")), replicas=2)
    async with asyncio.timeout(10.0):
        for index in range(8):
            assert await mesh.client.put(ticket, index, b"x", timeout=60.0)
    assert mesh.client.missed_replicas == 8


async def test_a_store_that_does_not_answer_has_nothing_and_grants_nothing(mesh):
    ticket = ticket_for(await mesh.start(Stalled(), "stalled"), ChunkSource("dead", "127.0.0.1:1"))
    assert await mesh.client.acquire(ticket) == frozenset()
    assert await mesh.client.renew(ticket) == frozenset()
    await mesh.client.release(ticket)
    assert await mesh.client.find_missing(ticket, ticket.chunks) == {chunk.key for chunk in ticket.chunks}
    assert not any([await mesh.client.put(ticket, i, b"x", timeout=0.2) for i in range(4)])


async def test_a_missing_chunk_is_a_miss_alone(mesh):
    source = Source()
    good = source.chunk

    async def chunk(key):
        if key == ticket.chunks[1].key:
            yield header(key, 0, MISSING)
        else:
            async for part in good(key):
                yield part

    source.chunk = chunk
    ticket = ticket_for(await mesh.start(source, "source"), chunks=3)
    assert await mesh.get(ticket) == [ticket.chunks[0].key, None, ticket.chunks[2].key]


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (lambda key: data(b"x"),),
        (lambda key: header(b"other", 1), lambda key: data(b"x")),
        (lambda key: header(key, 1001), *[lambda key: data(bytes(91))] * 11),
        (lambda key: header(key, 1 << 40), lambda key: data(b"x")),
        (lambda key: header(key, 0),),
        (lambda key: header(key, 2), lambda key: data(b"xyz")),
        (lambda key: header(key, 2), lambda key: data(b"x")),
        (lambda key: header(key, 2), lambda key: data(b"")),
        (lambda key: header(key, 2), lambda key: header(key, 2)),
        (lambda key: pb.GetChunksResponse(),),
    ],
)
async def test_a_source_that_breaks_the_protocol_is_a_miss(mesh, parts):
    ticket = ticket_for(await mesh.start(Scripted(*parts), "liar"), chunks=2)
    assert await mesh.get(ticket) == [None, None]


async def test_leaving_early_cancels_the_streams_and_reads_no_further(mesh):
    source = Source()
    ticket = ticket_for(await mesh.start(source, "source"), chunks=2000)
    async with aclosing(mesh.client.get(ticket, ticket.chunks, timeout_per_chunk=5.0)) as chunks:
        assert (await anext(chunks))[1] == ticket.chunks[0].key
    async with asyncio.timeout(10.0):
        while source.open:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(asyncio.all_tasks()) < 30


async def test_more_chunks_than_one_request_may_name(mesh):
    ticket = ticket_for(await mesh.start(Source(), "source"), chunks=1)
    chunks = list(ticket.chunks) * 5000
    async with aclosing(mesh.client.get(ticket, chunks, timeout_per_chunk=5.0)) as found:
        assert [content async for _, content in found] == [ticket.chunks[0].key] * 5000
