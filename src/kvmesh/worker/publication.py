"""KV from the engine to the store: encoded and put chunk by chunk, while later chunks are still being computed.

A chunk that cannot be put makes every later one useless to a decode worker: those are then not tried. So a store that
is dead or slow costs bounded time and never the request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from concurrent.futures import Executor
from typing import Self

from kvmesh.engine.api import KvArray, KvReady
from kvmesh.kv import bitstream
from kvmesh.kv.client import StoreClient
from kvmesh.kv.codec import Codec, Raw
from kvmesh.kv.codecs.adaptive import Adaptive
from kvmesh.scheduling.publishing import Chunk, Links, Load
from kvmesh.types import ChunkRef, KvTicket, Readers
from kvmesh.worker.traffic import Traffic, quality_of

UNUSED = KvTicket("", "", 0)


class Publication:
    """The chunks of one ticket.

    `missing`: indices of those to publish, all others are in the store already; None: no source can be reached.
    `codec` encodes them, raw by default; if it is adaptive, each chunk travels as suits the links to the store and to
    the `readers`. `async with` it: what is still under way at the end is cancelled.
    """

    def __init__(
        self,
        store: StoreClient,
        pool: Executor,
        ticket: KvTicket | None,
        missing: Collection[int] | None,
        *,
        dtype: str,
        codec: Codec | None = None,
        traffic: Traffic | None = None,
        readers: Readers | None = None,
        timeout: float = 3.0,
        in_flight: int = 4,
    ) -> None:
        self._store = store
        self._pool = pool
        self._ticket = ticket or UNUSED
        self._missing = frozenset(missing or ())
        self._reachable = missing is not None
        self._dtype = dtype
        self._codec = codec or Raw()
        self._traffic = traffic or Traffic()
        self._readers = readers or Readers()
        self._load = Load()
        self._timeout = timeout
        self._room = asyncio.Semaphore(in_flight)
        self._indices = {chunk.start: index for index, chunk in enumerate(self._ticket.chunks)}
        self._puts: dict[int, asyncio.Task[bool]] = {}
        self._failed = len(self._ticket.chunks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._puts.values():
            task.cancel()

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Token ranges to ask of the engine, ascending."""
        chunks = self._ticket.chunks
        return [(chunks[index].start, chunks[index].end) for index in sorted(self._missing)]

    def offer(self, ready: KvReady) -> None:
        """Publishes a chunk whose KV is final; returns at once."""
        index = self._indices[ready.start]
        self._puts[index] = asyncio.create_task(self._put(index, ready))

    async def finish(self, timeout: float) -> tuple[int, str]:
        """Waits for what is under way, `timeout` seconds at most; (leading chunks published, why not all)."""
        if self._puts:
            await asyncio.wait(self._puts.values(), timeout=timeout)
        if not self._reachable and self._ticket.chunks:
            return 0, "no source of the ticket answers"
        for index, chunk in enumerate(self._ticket.chunks):
            if reason := self._problem(index, chunk):
                return index, reason
        return len(self._ticket.chunks), ""

    def _problem(self, index: int, chunk: ChunkRef) -> str:
        put = self._puts.get(index)
        if index not in self._missing or (put and put.done() and not put.exception() and put.result()):
            return ""
        source = self._ticket.sources[chunk.source].worker_id
        if put is None:
            return f"the engine did not give out the chunk at token {chunk.start}"
        if not put.done():
            return f"{source} was too slow to take the chunk at token {chunk.start}"
        return f"{source} did not take the chunk at token {chunk.start}"

    async def _put(self, index: int, ready: KvReady) -> bool:
        async with self._room:
            if index > self._failed:
                return False
            chunk = self._ticket.chunks[index]
            # It may still be on its way from a device, and the event loop does not wait.
            data = await asyncio.get_running_loop().run_in_executor(self._pool, lambda: ready.data)
            bits = await self._encode(chunk, data)
            done = await self._send(index, bits)
            self._failed = self._failed if done else min(self._failed, index)
            if done:
                header = bitstream.read_header(bits)
                quality = quality_of(header.codec, header.quality_layers)
                self._traffic.published.add(quality, len(bits), header.array_bytes)
            return done

    async def _encode(self, chunk: ChunkRef, data: KvArray) -> bytes:
        codec, loop, traffic = self._choose(chunk, data), asyncio.get_running_loop(), self._traffic
        work = (data, self._dtype, chunk.first_layer, codec, chunk.start)
        bits, seconds = await loop.run_in_executor(self._pool, _timed, *work)
        traffic.encoded(bits, seconds)
        return bits

    def _choose(self, chunk: ChunkRef, data: KvArray) -> Codec:
        if not isinstance(self._codec, Adaptive):
            return self._codec
        traffic, members = self._traffic, self._codec.members
        source = self._ticket.sources[chunk.source]
        number = traffic.publishing.choose(
            [codec.format.id for codec in members],
            Chunk(data.nbytes, data.size, traffic.compute.seconds(chunk.start, chunk.end)),
            Links(traffic.remote(source), traffic.up(source).capacity, self._readers),
            (traffic.encoding, traffic.decoding),
            self._load,
        )
        return members[number]

    async def _send(self, index: int, bits: bytes) -> bool:
        """Measures the link; one that is known to need longer gets it."""
        link = self._traffic.up(self._ticket.sources[self._ticket.chunks[index].source])
        expected = len(bits) / link.share if link.share else 0.0
        link.requests += 1
        begun, size = link.begin(time.monotonic()), None
        try:
            done = await self._store.put(self._ticket, index, bits, timeout=max(self._timeout, 4 * expected))
            size = len(bits) if done else 0
            return done
        finally:
            link.end(begun, size, time.monotonic())
            link.requests -= 1


def _timed(data: KvArray, dtype: str, first_layer: int, codec: Codec, start: int) -> tuple[bytes, float]:
    """The seconds are the thread's own: a core that others kept busy must not make a codec look slow."""
    began = time.thread_time()
    return bitstream.encode(data, dtype, first_layer, codec, start), time.thread_time() - began
