"""A ticket's chunks, to and from whoever holds them.

Moves bytes only: encoding, decoding and verifying are the caller's, in a pool. A source that is dead, slow or lying
costs what it alone holds and nothing else: each such chunk becomes a miss. Nothing here raises for what a source does;
a caller learns of it by the result and recomputes.

Leases and puts go to the owners of a chunk; reads go on to its former owners, without a lease: see `kv.ticket`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvmesh.errors import DeadlineExceeded, KvmeshError, Unavailable
from kvmesh.kv.bitstream import MAX_BITSTREAM_BYTES
from kvmesh.kv.reading import MAX_KEYS, Channels, Fetched, Observe, Reader, name, unobserved
from kvmesh.kv.silence import Silence
from kvmesh.kv.ticket import candidates, owners, parent_of
from kvmesh.rpc.stream import AwaitableCall, unary
from kvmesh.types import ChunkRef, KvTicket
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as rpc

__all__ = ["ChunkStat", "Fetched", "StoreClient"]

FRAME_BYTES = 1 << 20
LAGGARD_SECONDS = 1.0
"""What a replica may at least take longer than the first before it is given up."""

SILENT = (DeadlineExceeded, Unavailable)

Reply = TypeVar("Reply")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChunkStat:
    """What a source says of a chunk that it has. `layer_ends`, in bytes: prefixes that decode, the last is the whole.

    `codec`: its id in the bitstream. `tier`: pb.CHUNK_TIER_*. `source` indexes the ticket's.
    """

    size: int
    layer_ends: tuple[int, ...]
    codec: int
    tier: int
    leases: int
    source: int


class StoreClient:
    """`timeout` in seconds bounds each call that carries no KV."""

    def __init__(self, channels: Channels, *, timeout: float = 2.0, max_chunk_bytes: int = MAX_BITSTREAM_BYTES) -> None:
        self._channels = channels
        self._timeout = timeout
        self._silence = Silence()
        self._reader = Reader(channels, self._silence, max_chunk_bytes)
        self.missed_replicas = 0
        """Puts that an owner did not take though another did."""

    async def acquire(self, ticket: KvTicket) -> frozenset[int]:
        """Takes the ticket's lease, or extends it, in each owner of a chunk; returns who granted it."""
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
        """Keys of the chunks that no source has. Owners pin the others under the lease; a dead source lacks all."""
        missing = await self._missing(ticket, chunks, owners, ticket.lease_id)
        rest = [chunk for chunk in chunks if chunk.key in missing]
        return await self._missing(ticket, rest, self._former_owners, None)

    async def stat(self, ticket: KvTicket, chunks: Sequence[ChunkRef]) -> dict[bytes, ChunkStat]:
        """What is known of the chunks that some source has, by key. Read only: nothing is touched or pinned."""
        pages = list(_pages(ticket, chunks, candidates))
        answers = await asyncio.gather(*(self._stat(ticket, source, keys) for source, keys in pages))
        found = {(source, stat.key): stat for (source, _), page in zip(pages, answers, strict=True) for stat in page}
        stats: dict[bytes, ChunkStat] = {}
        for chunk in chunks:
            for source in candidates(ticket, chunk):
                if chunk.key not in stats and (stat := found.get((source, chunk.key))):
                    stats[chunk.key] = _chunk_stat(stat, source)
        return stats

    async def put(self, ticket: KvTicket, index: int, bitstream: bytes, *, timeout: float) -> bool:
        """Stores chunk `index` at its owners, under the lease. False: none took it; the log says why."""
        sources = owners(ticket, ticket.chunks[index])
        puts = {
            asyncio.create_task(self._put(ticket, index, source, bitstream, timeout)): ticket.sources[source].address
            for source in sources
        }
        try:
            return await self._settle(puts)
        finally:
            for each in puts:
                each.cancel()

    def get(
        self,
        ticket: KvTicket,
        chunks: Sequence[ChunkRef],
        *,
        timeout_per_chunk: float,
        observe: Observe = unobserved,
    ) -> AsyncGenerator[tuple[ChunkRef, bytes | None], None]:
        """The bitstreams of `chunks`, in their order; None is a miss. See `Reader.get`."""
        return self._reader.get(ticket, chunks, timeout_per_chunk=timeout_per_chunk, observe=observe)

    async def fetch(self, ticket: KvTicket, chunk: ChunkRef, *, layers: int = 0, timeout: float) -> Fetched | None:
        """One chunk, or its first `layers` quality layers; None is a miss. See `Reader.fetch`."""
        return await self._reader.fetch(ticket, chunk, layers=layers, timeout=timeout)

    async def _settle(self, puts: Mapping[asyncio.Task[bool], str]) -> bool:
        """True as soon as one has succeeded and the others, at these addresses, had as much time again."""
        began, waiting = time.monotonic(), set(puts)
        while waiting and not any(map(_took, puts)):
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if hopeful := [put for put in waiting if puts[put] not in self._silence]:
            await asyncio.wait(hopeful, timeout=max(LAGGARD_SECONDS, time.monotonic() - began))
        for put, address in puts.items():
            if not put.done():
                self._silence.note(address)
        taken = sum(map(_took, puts))
        self.missed_replicas += len(puts) - taken if taken else 0
        return taken > 0

    async def _put(self, ticket: KvTicket, index: int, source: int, bitstream: bytes, timeout: float) -> bool:
        chunk = ticket.chunks[index]
        header = pb.PutChunkHeader(
            key=chunk.key,
            fingerprint=ticket.fingerprint,
            size=len(bitstream),
            parent_key=parent_of(ticket, index),
            tail=chunk.tail,
            tenant=ticket.tenant,
        )
        call = self._store(ticket, source).PutChunks(_parts(header, ticket.lease_id, bitstream), timeout=timeout)
        response = await self._answer(call, ticket, source)
        status = response.results[0].status if response and response.results else pb.CHUNK_STATUS_UNSPECIFIED
        if status in (pb.CHUNK_STATUS_CORRUPT, pb.CHUNK_STATUS_FULL):
            log.warning("%s did not take a chunk: %s", name(ticket.sources[source]), pb.ChunkStatus.Name(status))
        return status in (pb.CHUNK_STATUS_OK, pb.CHUNK_STATUS_EXISTS)

    async def _missing(
        self, ticket: KvTicket, chunks: Sequence[ChunkRef], route: Route, lease_id: str | None
    ) -> set[bytes]:
        """Keys that no source of their route has."""
        pages = list(_pages(ticket, chunks, route))
        answers = await asyncio.gather(*(self._find(ticket, source, keys, lease_id) for source, keys in pages))
        return {chunk.key for chunk in chunks} - set().union(*answers)

    async def _find(self, ticket: KvTicket, source: int, keys: list[bytes], lease_id: str | None) -> set[bytes]:
        request = pb.FindMissingChunksRequest(keys=keys, lease_id=lease_id)
        call = self._store(ticket, source).FindMissingChunks(request, timeout=self._timeout)
        response = await self._answer(call, ticket, source)
        return set() if response is None else set(keys) - set(response.missing_keys)

    async def _stat(self, ticket: KvTicket, source: int, keys: list[bytes]) -> list[pb.ChunkStat]:
        call = self._store(ticket, source).StatChunks(pb.StatChunksRequest(keys=keys), timeout=self._timeout)
        response = await self._answer(call, ticket, source)
        return [stat for stat in response.chunks if stat.present] if response else []

    async def _each(
        self, ticket: KvTicket, ask: Callable[[rpc.KvStoreServiceAsyncStub], AwaitableCall[Any]]
    ) -> frozenset[int]:
        sources = sorted({source for chunk in ticket.chunks for source in owners(ticket, chunk)})
        answers = await asyncio.gather(*(self._answer(ask(self._store(ticket, s)), ticket, s) for s in sources))
        return frozenset(source for source, answer in zip(sources, answers, strict=True) if answer is not None)

    async def _answer(self, call: AwaitableCall[Reply], ticket: KvTicket, source: int) -> Reply | None:
        address = ticket.sources[source].address
        try:
            answer = await unary(call)
        except KvmeshError as error:
            if isinstance(error, SILENT):
                self._silence.note(address)
            log.warning("%s: %s", name(ticket.sources[source]), error)
            return None
        self._silence.broken(address)
        return answer

    def _former_owners(self, ticket: KvTicket, chunk: ChunkRef) -> list[int]:
        """Those who answer: no request waits long for what is only perhaps there."""
        former = candidates(ticket, chunk)[ticket.replicas :]
        return [source for source in former if ticket.sources[source].address not in self._silence]

    def _store(self, ticket: KvTicket, source: int) -> rpc.KvStoreServiceAsyncStub:
        return rpc.KvStoreServiceStub(self._channels.get(ticket.sources[source].address))


Route = Callable[[KvTicket, ChunkRef], Iterable[int]]
"""The sources that are to be asked for a chunk."""


def _pages(ticket: KvTicket, chunks: Sequence[ChunkRef], route: Route) -> Iterator[tuple[int, list[bytes]]]:
    """What to ask each source for, as many keys at a time as one request may name."""
    asked: dict[int, list[bytes]] = {}
    for chunk in chunks:
        for source in route(ticket, chunk):
            asked.setdefault(source, []).append(chunk.key)
    for source, keys in asked.items():
        yield from ((source, keys[i : i + MAX_KEYS]) for i in range(0, len(keys), MAX_KEYS))


def _took(put: asyncio.Task[bool]) -> bool:
    return put.done() and put.result()


def _chunk_stat(stat: pb.ChunkStat, source: int) -> ChunkStat:
    return ChunkStat(stat.size, tuple(stat.layer_ends), stat.codec_id, stat.tier, stat.leases, source)


def _parts(header: pb.PutChunkHeader, lease_id: str, bitstream: bytes) -> Iterator[pb.PutChunksRequest]:
    yield pb.PutChunksRequest(header=header, lease_id=lease_id)
    for start in range(0, len(bitstream), FRAME_BYTES):
        yield pb.PutChunksRequest(data=bitstream[start : start + FRAME_BYTES])
