"""KV from the store into the engine: fetched, checked, decoded and written while later chunks are still on the way.

Whatever is missing, damaged, late or of another shape is a miss, and ends the import: the rest is recomputed. So it is
where the policy of adaptive streaming says that computing is faster.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field

from kvmesh.engine.api import KvArray, KvLayout
from kvmesh.errors import InvalidArgument
from kvmesh.kv import bitstream
from kvmesh.kv.client import StoreClient
from kvmesh.kv.codec import Codec, Raw
from kvmesh.kv.codecs.adaptive import Adaptive, member
from kvmesh.scheduling.streaming import Streaming
from kvmesh.types import ChunkRef, KvTicket
from kvmesh.worker.streaming import FASTER, Arrival, Stream, in_bulk
from kvmesh.worker.thread import EngineThread
from kvmesh.worker.traffic import Traffic, quality_of


@dataclass(frozen=True, slots=True)
class Imported:
    """KV of tokens up to `end` is in the pool, `chunks` chunks of it new; `reason`: why not all, or empty.

    `bytes` came for it, in chunks of these `qualities`; `throughput`: bytes/s of the slowest link, 0 if unknown.
    """

    end: int
    chunks: int = 0
    reason: str = ""
    bytes: int = 0
    qualities: Counter[str] = field(default_factory=Counter)
    throughput: float = 0.0

    @property
    def missed(self) -> bool:
        """A chunk that was to be had was not: it was lost, or came damaged."""
        return bool(self.reason) and self.reason != FASTER


class Importer:
    """`timeout`: seconds that one chunk may take. `in_flight`: fetched chunks that are not yet in the pool.

    `codec`: the one that all chunks of this worker's namespace are encoded with, raw by default. If it is adaptive,
    what comes from other hosts is streamed, in versions that the policy chooses.
    """

    def __init__(
        self,
        store: StoreClient,
        engine: EngineThread,
        pool: Executor,
        *,
        codec: Codec | None = None,
        traffic: Traffic | None = None,
        timeout: float = 3.0,
        in_flight: int = 8,
    ) -> None:
        self._store = store
        self._engine = engine
        self._pool = pool
        self._codec = codec or Raw()
        self._traffic = traffic or Traffic()
        self._timeout = timeout
        self._in_flight = in_flight

    async def fetch(
        self,
        request_id: str,
        ticket: KvTicket,
        chunks: Sequence[ChunkRef],
        local: int,
        *,
        prompt: int = 0,
        limit: float | None = None,
    ) -> Imported:
        """Imports `chunks`, consecutive ones of the ticket that begin at or before `local`, up to the first miss.

        `prompt`: tokens of the whole prompt; `limit`: when it should be computed, a reading of `time.monotonic()`. When
        it returns, the engine has been given everything that it counts as imported.
        """
        room = asyncio.Semaphore(self._in_flight)
        imports: list[asyncio.Task[str]] = []
        moved: Counter[str] = Counter()
        size = 0
        policy = Streaming(max(prompt, chunks[-1].end), self._traffic.compute, self._traffic.floor, limit)
        try:
            async with aclosing(self._arrivals(ticket, chunks, policy)) as arrivals:
                async for arrival in arrivals:
                    await room.acquire()
                    imports.append(asyncio.create_task(self._import(request_id, arrival, moved, room)))
                    size += len(arrival.bits or b"")
                    if arrival.bits is None or any(task.done() and task.result() for task in imports):
                        break
            problems = await asyncio.gather(*imports)
        finally:
            for task in imports:
                task.cancel()
        good = next((i for i, problem in enumerate(problems) if problem), len(problems))
        end = max(local, chunks[good - 1].end) if good else local
        reason = problems[good] if good < len(problems) else ""
        return self._noted(Imported(end, good, reason, size, moved, self._traffic.slowest(ticket)))

    def _arrivals(
        self, ticket: KvTicket, chunks: Sequence[ChunkRef], policy: Streaming
    ) -> AsyncGenerator[Arrival, None]:
        """On one host whole and in bulk, whatever seems faster: there a busy machine is no slow link."""
        sources = {ticket.sources[chunk.source] for chunk in chunks}
        if isinstance(self._codec, Adaptive) and any(map(self._traffic.remote, sources)):
            elements = math.prod(self._engine.layout.chunk_shape(1))
            stream = Stream(self._store, self._traffic, ticket, policy, elements, self._timeout)
            return stream.arrivals(chunks)
        return in_bulk(self._store, ticket, chunks, self._timeout)

    async def _import(self, request_id: str, arrival: Arrival, moved: Counter[str], room: asyncio.Semaphore) -> str:
        """Why the chunk could not be used; empty if it was."""
        try:
            if arrival.bits is None:
                return arrival.reason
            data, quality = await self._decode(arrival.chunk, arrival.bits)
            await self._engine.import_kv(request_id, arrival.chunk.start, data)
            moved[quality] += 1
            self._traffic.fetched.add(quality, len(arrival.bits), data.nbytes)
            return ""
        except (bitstream.CorruptChunk, InvalidArgument) as error:
            return f"the chunk at token {arrival.chunk.start} is unusable: {error}"
        finally:
            room.release()

    async def _decode(self, chunk: ChunkRef, bits: bytes) -> tuple[KvArray, str]:
        """The chunk's KV and the name of its quality; the pool's backlog counts it meanwhile."""
        header, speed, loop = bitstream.read_header(bits), self._traffic.decoding, asyncio.get_running_loop()
        kind, layout = (header.codec, header.quality_layers, math.prod(header.shape)), self._engine.layout
        expected = speed.seconds(*kind)
        speed.backlog += expected
        try:
            data, seconds = await loop.run_in_executor(self._pool, _timed, bits, chunk, layout, self._codec)
        finally:
            speed.backlog = max(0.0, speed.backlog - expected)
        speed.observe(*kind, seconds)
        return data, quality_of(header.codec, header.quality_layers)

    def _noted(self, imported: Imported) -> Imported:
        self._traffic.missed_chunks += imported.missed
        return imported


def _timed(bits: bytes, chunk: ChunkRef, layout: KvLayout, codec: Codec) -> tuple[KvArray, float]:
    """In seconds that pass, as those of links and of computing, which the policy weighs them against."""
    began = time.perf_counter()
    return decode(bits, chunk, layout, codec), time.perf_counter() - began


def decode(bits: bytes, chunk: ChunkRef, layout: KvLayout, codec: Codec) -> KvArray:
    """The KV of a bitstream, if it is what the ticket promises.

    Raises:
        CorruptChunk: damaged, or not of this chunk's range, this layout or this codec.
    """
    header = bitstream.read_header(bits)
    found = (header.dtype, header.first_layer, *header.shape)
    expected = (layout.dtype, chunk.first_layer, *layout.chunk_shape(chunk.tokens))
    if found != expected:
        raise bitstream.CorruptChunk(f"it holds {found} where {expected} is due")
    return bitstream.decode(bits, member(codec, header.codec)).data
