"""Chunks from remote sources, each in the version that the policy chooses when its turn comes.

Two are on the way at a time: one fills the link while the next is decided by what the last one showed. Where the link
is fast and there is nothing to choose, all are asked for at once: then every call between them is time lost.

A chunk that is missing, or late beyond the policy's patience, ends the stream; so does the choice to compute the rest.
Decides nothing itself: `kvmesh.scheduling.streaming` does. Knows no engine.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from kvmesh.kv.client import ChunkStat, Fetched, StoreClient
from kvmesh.kv.reading import Observe, unobserved
from kvmesh.scheduling.link import Link
from kvmesh.scheduling.streaming import Offer, Outlook, Streaming, Version
from kvmesh.types import ChunkRef, KvTicket
from kvmesh.worker.traffic import Traffic

IN_FLIGHT = 2
FASTER = "computing was faster than fetching"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A chunk's bitstream; None with the reason why it did not come, or why it was not asked for."""

    chunk: ChunkRef
    bits: bytes | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Flight:
    chunk: ChunkRef
    size: int
    task: asyncio.Task[Fetched | None]


async def in_bulk(
    store: StoreClient, ticket: KvTicket, chunks: Sequence[ChunkRef], timeout: float, observe: Observe = unobserved
) -> AsyncGenerator[Arrival, None]:
    """`chunks` whole and in their order, from one call to each source; the first that is missed is the last."""
    found = store.get(ticket, chunks, timeout_per_chunk=timeout, observe=observe)
    async with aclosing(found) as bitstreams:
        async for chunk, bits in bitstreams:
            yield Arrival(chunk, bits, "" if bits is not None else _missing(chunk))
            if bits is None:
                return


class Stream:
    """The chunks of one request. `elements`: numbers of KV in a token. `timeout`: seconds for a chunk if computing it
    is no alternative; longer where the link is known to need it."""

    def __init__(
        self, store: StoreClient, traffic: Traffic, ticket: KvTicket, policy: Streaming, elements: int, timeout: float
    ) -> None:
        self._store = store
        self._traffic = traffic
        self._ticket = ticket
        self._policy = policy
        self._elements = elements
        self._timeout = timeout
        self._flights: deque[Flight] = deque()

    async def arrivals(self, chunks: Sequence[ChunkRef]) -> AsyncGenerator[Arrival, None]:
        """`chunks` in their order, the last one without bits unless all came. Close it when leaving it early."""
        offers, going_on = await self._offers(chunks), True
        there = chunks[: len(offers)]
        with self._sharing(chunks):
            coming = self._in_bulk(there) if self._settled(there, offers) else self._in_turn(there, offers)
            async with aclosing(coming) as arrivals:
                async for arrival in arrivals:
                    yield arrival
                    going_on = arrival.bits is not None
        if going_on and len(offers) < len(chunks):
            yield Arrival(chunks[len(offers)], None, _missing(chunks[len(offers)]))

    async def _in_turn(self, chunks: Sequence[ChunkRef], offers: Sequence[Offer]) -> AsyncGenerator[Arrival, None]:
        waiting, ended = deque(zip(chunks, offers, strict=True)), ""
        try:
            while self._flights or (waiting and not ended):
                while waiting and not ended and len(self._flights) < IN_FLIGHT:
                    chunk, offer = waiting.popleft()
                    ended = self._ask(chunk, offer, [later for _, later in waiting])
                if self._flights:
                    yield await self._land()
            if ended:
                yield Arrival(chunk, None, ended)
        finally:
            for flight in self._flights:
                flight.task.cancel()

    def _in_bulk(self, chunks: Sequence[ChunkRef]) -> AsyncGenerator[Arrival, None]:
        def observe(source: int, seconds: float, size: int) -> None:
            self._traffic.down(self._ticket.sources[source]).streamed(seconds, size)

        return in_bulk(self._store, self._ticket, chunks, self._timeout, observe)

    def _settled(self, chunks: Sequence[ChunkRef], offers: Sequence[Offer]) -> bool:
        """Will nothing that the first chunks show change how the others are asked for?"""
        if not chunks or not all(self._link(chunk).fast for chunk in chunks):
            return False
        return self._policy.whole(offers, self._outlook(self._link(chunks[0])), time.monotonic())

    def _ask(self, chunk: ChunkRef, offer: Offer, later: Sequence[Offer]) -> str:
        """Asks for a chunk; or says why not."""
        now, link = time.monotonic(), self._link(chunk)
        outlook = self._outlook(link)
        version = self._policy.next([offer, *later], outlook, now)
        if version is None:
            return FASTER
        expected = outlook.wire + version.size / (outlook.throughput or math.inf)
        patience = self._policy.patience(offer, expected, now)
        timeout = max(self._timeout, 4 * expected) if math.isinf(patience) else patience
        task = asyncio.create_task(self._fetch(chunk, version, link, timeout))
        self._flights.append(Flight(chunk, version.size, task))
        return ""

    async def _land(self) -> Arrival:
        flight = self._flights[0]
        fetched = await flight.task
        self._flights.popleft()
        return Arrival(flight.chunk, fetched.bits if fetched else None, "" if fetched else _missing(flight.chunk))

    async def _fetch(self, chunk: ChunkRef, version: Version, link: Link, timeout: float) -> Fetched | None:
        begun, size = link.begin(time.monotonic()), None
        try:
            fetched = await self._store.fetch(self._ticket, chunk, layers=version.layers, timeout=timeout)
            size = len(fetched.bits) if fetched else 0
            return fetched
        finally:
            link.end(begun, size, time.monotonic())

    def _outlook(self, link: Link) -> Outlook:
        rate, coming = link.share, sum(flight.size for flight in self._flights)
        wire = coming / rate if rate else 0.0
        return Outlook(rate, wire if self._flights else link.latency, self._traffic.decoding.backlog)

    async def _offers(self, chunks: Sequence[ChunkRef]) -> list[Offer]:
        """What there is of the chunks, up to the first that no source has."""
        began = time.monotonic()
        stats = await self._store.stat(self._ticket, chunks)
        if stats:
            self._link(chunks[0]).answered(time.monotonic() - began)
        offers = []
        for chunk in chunks:
            if chunk.key not in stats:
                break
            offers.append(self._offer(chunk, stats[chunk.key]))
        return offers

    def _offer(self, chunk: ChunkRef, stat: ChunkStat) -> Offer:
        """A tail only in its finest version: it is small, and read next."""
        elements, decoding = chunk.tokens * self._elements, self._traffic.decoding
        ends = list(enumerate(stat.layer_ends or (stat.size,), start=1))
        versions = tuple(Version(layers, end, decoding.seconds(stat.codec, layers, elements)) for layers, end in ends)
        return Offer(chunk.start, chunk.end, versions[-1:] if chunk.tail else versions, elements)

    def _link(self, chunk: ChunkRef) -> Link:
        return self._traffic.down(self._ticket.sources[chunk.source])

    @contextmanager
    def _sharing(self, chunks: Sequence[ChunkRef]) -> Iterator[None]:
        """Counts as one of the requests that share the links."""
        links = [self._traffic.down(self._ticket.sources[source]) for source in {chunk.source for chunk in chunks}]
        for link in links:
            link.requests += 1
        try:
            yield
        finally:
            for link in links:
                link.requests -= 1


def _missing(chunk: ChunkRef) -> str:
    return f"the chunk at token {chunk.start} could not be fetched"
