"""A ticket's chunks, to and from whoever holds them.

Moves bytes only: encoding, decoding and verifying are the caller's, in a pool. A source that is dead, slow or lying
costs its own chunks and nothing else: each of them becomes a miss. Nothing here raises for what a source does; a caller
learns of it by the result and recomputes. Memory is bounded by READ_AHEAD chunks for each source.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import grpc

from kvmesh.errors import KvmeshError
from kvmesh.kv.bitstream import MAX_BITSTREAM_BYTES
from kvmesh.kv.ticket import parent_of
from kvmesh.rpc.stream import AwaitableCall, stream, unary
from kvmesh.types import ChunkRef, KvTicket
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as rpc

FRAME_BYTES = 1 << 20
MAX_KEYS = 4096
READ_AHEAD = 2
"""Chunks that a source may be ahead of the consumer."""

Reply = TypeVar("Reply")
log = logging.getLogger(__name__)


class Channels(Protocol):
    """What is needed of `kvmesh.rpc.channel.ChannelPool`."""

    def get(self, address: str) -> grpc.aio.Channel: ...


class StoreClient:
    """`timeout` in seconds bounds each call that carries no KV."""

    def __init__(self, channels: Channels, *, timeout: float = 2.0, max_chunk_bytes: int = MAX_BITSTREAM_BYTES) -> None:
        self._channels = channels
        self._timeout = timeout
        self._max_chunk_bytes = max_chunk_bytes

    async def acquire(self, ticket: KvTicket) -> frozenset[int]:
        """Takes the ticket's lease, or extends it, in each source that it places chunks at; returns who granted it."""
        request = pb.AcquireLeaseRequest(lease_id=ticket.lease_id, ttl_ms=ticket.lease_ttl_ms)
        return await self._each(ticket, lambda store: store.AcquireLease(request, timeout=self._timeout))

    async def renew(self, ticket: KvTicket) -> frozenset[int]:
        """Extends the lease; returns the sources that still hold it."""
        request = pb.RenewLeaseRequest(lease_id=ticket.lease_id, ttl_ms=ticket.lease_ttl_ms)
        return await self._each(ticket, lambda store: store.RenewLease(request, timeout=self._timeout))

    async def release(self, ticket: KvTicket) -> None:
        """Ends the lease. Idempotent; where a source does not answer, the lease runs out by itself."""
        request = pb.ReleaseLeaseRequest(lease_id=ticket.lease_id)
        await self._each(ticket, lambda store: store.ReleaseLease(request, timeout=self._timeout))

    async def find_missing(self, ticket: KvTicket, chunks: Sequence[ChunkRef]) -> set[bytes]:
        """Keys of the chunks that their source lacks; it pins the others under the lease. A dead source lacks all."""
        pages = [
            (source, [c.key for c in theirs[i : i + MAX_KEYS]])
            for source, theirs in _by_source(chunks).items()
            for i in range(0, len(theirs), MAX_KEYS)
        ]
        missing = await asyncio.gather(*(self._missing(ticket, source, keys) for source, keys in pages))
        return set().union(*missing)

    async def put(self, ticket: KvTicket, index: int, bitstream: bytes, *, timeout: float) -> bool:
        """Stores chunk `index` at its source, under the lease. False: it is not there; the log says why."""
        chunk = ticket.chunks[index]
        header = pb.PutChunkHeader(
            key=chunk.key,
            fingerprint=ticket.fingerprint,
            size=len(bitstream),
            parent_key=parent_of(ticket, index),
            tail=chunk.tail,
        )
        call = self._store(ticket, chunk.source).PutChunks(_put(header, ticket.lease_id, bitstream), timeout=timeout)
        response = await self._answer(call, ticket, chunk.source)
        status = response.results[0].status if response and response.results else pb.CHUNK_STATUS_UNSPECIFIED
        if status in (pb.CHUNK_STATUS_CORRUPT, pb.CHUNK_STATUS_FULL):
            log.warning("%s did not take a chunk: %s", _name(ticket, chunk.source), pb.ChunkStatus.Name(status))
        return status in (pb.CHUNK_STATUS_OK, pb.CHUNK_STATUS_EXISTS)

    async def get(
        self, ticket: KvTicket, chunks: Sequence[ChunkRef], *, timeout_per_chunk: float
    ) -> AsyncGenerator[tuple[ChunkRef, bytes | None], None]:
        """The bitstreams of `chunks`, in their order, while all sources stream at once; None is a miss.

        The first chunk that takes longer than `timeout_per_chunk` seconds makes a miss of the rest of its source. Time
        that the consumer takes does not count. Close the iterator (`contextlib.aclosing`) when leaving it early.
        """
        groups = _by_source(chunks)
        queues = {source: asyncio.Queue[bytes | None](READ_AHEAD) for source in groups}
        pumps = [
            asyncio.create_task(self._pump(ticket, source, theirs, timeout_per_chunk, queues[source]))
            for source, theirs in groups.items()
        ]
        try:
            for chunk in chunks:
                yield chunk, await queues[chunk.source].get()
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self,
        ticket: KvTicket,
        source: int,
        chunks: Sequence[ChunkRef],
        timeout: float,
        queue: asyncio.Queue[bytes | None],
    ) -> None:
        """Puts exactly one result for each chunk: a consumer waits for it."""
        given = 0
        try:
            for i in range(0, len(chunks), MAX_KEYS):
                keys = [chunk.key for chunk in chunks[i : i + MAX_KEYS]]
                async with stream(self._source(ticket, source).GetChunks(pb.GetChunksRequest(keys=keys))) as call:
                    parts = aiter(call)
                    for key in keys:
                        async with asyncio.timeout(timeout):
                            bitstream = await _receive(parts, key, self._max_chunk_bytes)
                        await queue.put(bitstream)
                        given += 1
        except Exception as error:  # whatever it is, the consumer must not wait for ever
            lost = len(chunks) - given
            log.warning("%s lost %d chunks: %s", _name(ticket, source), lost, error or type(error).__name__)
        for _ in range(len(chunks) - given):
            await queue.put(None)

    async def _missing(self, ticket: KvTicket, source: int, keys: list[bytes]) -> set[bytes]:
        request = pb.FindMissingChunksRequest(keys=keys, lease_id=ticket.lease_id)
        call = self._store(ticket, source).FindMissingChunks(request, timeout=self._timeout)
        response = await self._answer(call, ticket, source)
        return set(keys if response is None else response.missing_keys)

    async def _each(
        self, ticket: KvTicket, ask: Callable[[rpc.KvStoreServiceAsyncStub], AwaitableCall[Any]]
    ) -> frozenset[int]:
        sources = list(_by_source(ticket.chunks))
        answers = await asyncio.gather(*(self._answer(ask(self._store(ticket, s)), ticket, s) for s in sources))
        return frozenset(source for source, answer in zip(sources, answers, strict=True) if answer is not None)

    async def _answer(self, call: AwaitableCall[Reply], ticket: KvTicket, source: int) -> Reply | None:
        try:
            return await unary(call)
        except KvmeshError as error:
            log.warning("%s: %s", _name(ticket, source), error)
            return None

    def _store(self, ticket: KvTicket, source: int) -> rpc.KvStoreServiceAsyncStub:
        return rpc.KvStoreServiceStub(self._channels.get(ticket.sources[source].address))

    def _source(self, ticket: KvTicket, source: int) -> rpc.ChunkSourceServiceAsyncStub:
        return rpc.ChunkSourceServiceStub(self._channels.get(ticket.sources[source].address))


class _BrokenStream(Exception):
    """A source that does not keep to the protocol."""


async def _receive(parts: AsyncIterator[pb.GetChunksResponse], key: bytes, limit: int) -> bytes | None:
    """One chunk from a GetChunks stream; nothing is allocated on the word of the source."""
    header = await _next(parts, "header")
    if header.header.key != key:
        raise _BrokenStream("chunks out of order")
    if header.header.status != pb.CHUNK_STATUS_OK:
        return None
    left = header.header.size
    if not 0 < left <= limit:
        raise _BrokenStream(f"a chunk of {left} bytes")
    frames: list[bytes] = []
    while left:
        frames.append((await _next(parts, "data")).data)
        left -= len(frames[-1])
        if not frames[-1] or left < 0:
            raise _BrokenStream("a chunk of another size than its header says")
    return b"".join(frames)


async def _next(parts: AsyncIterator[pb.GetChunksResponse], kind: str) -> pb.GetChunksResponse:
    part = await anext(parts, None)
    if part is None or part.WhichOneof("part") != kind:
        raise _BrokenStream(f"no {kind} where one is due")
    return part


def _put(header: pb.PutChunkHeader, lease_id: str, bitstream: bytes) -> Iterator[pb.PutChunksRequest]:
    yield pb.PutChunksRequest(header=header, lease_id=lease_id)
    for start in range(0, len(bitstream), FRAME_BYTES):
        yield pb.PutChunksRequest(data=bitstream[start : start + FRAME_BYTES])


def _by_source(chunks: Sequence[ChunkRef]) -> dict[int, list[ChunkRef]]:
    groups: dict[int, list[ChunkRef]] = {}
    for chunk in chunks:
        groups.setdefault(chunk.source, []).append(chunk)
    return groups


def _name(ticket: KvTicket, source: int) -> str:
    return f"source {ticket.sources[source].worker_id} at {ticket.sources[source].address}"
