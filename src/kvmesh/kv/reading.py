"""Chunks from their sources: streamed in order, each from the first source that has it.

Moves bytes and checks lengths; verifying and decoding are the caller's. A source that is dead, slow or lying is left
for the next that may have its chunks, and nothing here raises for what a source does: what nobody has is a miss.
Memory is bounded by READ_AHEAD chunks for each order of sources that the chunks ask for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import grpc

from kvmesh.kv.bitstream import MAX_BITSTREAM_BYTES
from kvmesh.kv.silence import Silence
from kvmesh.kv.ticket import candidates
from kvmesh.rpc.stream import stream
from kvmesh.types import ChunkRef, ChunkSource, KvTicket
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as rpc

MAX_KEYS = 4096
READ_AHEAD = 2
"""Chunks that a stream may be ahead of the consumer."""

log = logging.getLogger(__name__)


class Channels(Protocol):
    """What is needed of `kvmesh.rpc.channel.ChannelPool`."""

    def get(self, address: str) -> grpc.aio.Channel: ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """A chunk's bitstream or, where not all layers were asked for, a prefix of it.

    `seconds` is from the request to the last byte, `waited` of them until the first message came; what is between
    them is the link's time for `len(bits)` bytes. `layer_ends` as in `kvmesh.kv.bitstream.Header`, of the whole chunk;
    `source` indexes the ticket's.
    """

    bits: bytes
    seconds: float
    waited: float
    layer_ends: tuple[int, ...] = ()
    codec: int = 0
    source: int = 0


Observe = Callable[[int, float, int], None]
"""Told of a source, by its index, how many seconds it took for how many bytes; 0 if it failed."""


def unobserved(source: int, seconds: float, size: int) -> None: ...


class Reader:
    """`max_chunk_bytes`: larger ones are not taken. Sources that were silent lately are asked last."""

    def __init__(self, channels: Channels, silence: Silence, max_chunk_bytes: int = MAX_BITSTREAM_BYTES) -> None:
        self._channels, self._silence, self._limit = channels, silence, max_chunk_bytes

    async def fetch(self, ticket: KvTicket, chunk: ChunkRef, *, layers: int, timeout: float) -> Fetched | None:
        """One chunk, or its first `layers` quality layers (0: all), within `timeout` seconds; None is a miss.

        A source that is silent for its share of the time is left for the next.
        """
        sources = self._silence.last(ticket, candidates(ticket, chunk))
        until = asyncio.get_running_loop().time() + timeout
        for source in sources:
            try:
                async with asyncio.timeout_at(until):
                    found = self.each(ticket.sources[source], [chunk.key], layers, None, timeout / len(sources))
                    async with aclosing(found) as results:
                        if (fetched := await anext(results)) is not None:
                            return replace(fetched, source=source)
            except Exception as error:
                self._silence.note(ticket.sources[source].address)
                log.warning("%s lost a chunk: %s", name(ticket.sources[source]), error or type(error).__name__)
        return None

    async def get(
        self,
        ticket: KvTicket,
        chunks: Sequence[ChunkRef],
        *,
        timeout_per_chunk: float,
        observe: Observe = unobserved,
    ) -> AsyncGenerator[tuple[ChunkRef, bytes | None], None]:
        """The bitstreams of `chunks`, in their order, while all sources stream at once; None is a miss.

        A source that takes longer than `timeout_per_chunk` seconds for one is not asked again. Time that the consumer
        takes does not count. Close the iterator (`contextlib.aclosing`) when leaving it early.
        """
        routes: dict[tuple[int, ...], list[ChunkRef]] = {}
        for chunk in chunks:
            routes.setdefault(candidates(ticket, chunk), []).append(chunk)
        queues = {route: asyncio.Queue[bytes | None](READ_AHEAD) for route in routes}
        pumps = [
            asyncio.create_task(self._pump(ticket, route, theirs, timeout_per_chunk, queues[route], observe))
            for route, theirs in routes.items()
        ]
        try:
            for chunk in chunks:
                yield chunk, await queues[candidates(ticket, chunk)].get()
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self,
        ticket: KvTicket,
        route: tuple[int, ...],
        chunks: Sequence[ChunkRef],
        timeout: float,
        queue: asyncio.Queue[bytes | None],
        observe: Observe,
    ) -> None:
        """Puts exactly one result for each chunk: a consumer waits for it."""
        left, sources, missed = deque(chunk.key for chunk in chunks), deque(self._silence.last(ticket, route)), 0
        while left and sources:
            source = ticket.sources[sources[0]]
            try:
                async with aclosing(self.each(source, list(left), 0, timeout)) as results:
                    async for found in results:
                        if found is None and missed + 1 < len(sources):
                            break
                        if found is not None:
                            observe(sources[0], found.seconds, len(found.bits))
                        await queue.put(found.bits if found else None)
                        left.popleft()
                        missed = 0
            except Exception as error:  # whatever it is, the consumer must not wait for ever
                self._silence.note(source.address)
                observe(sources[0], timeout, 0)
                log.warning("%s lost %d chunks: %s", name(source), len(left), error or type(error).__name__)
                sources.popleft()
                missed = 0
            else:
                # What one source lacks the next has, and probably what follows too.
                sources.rotate(-1)
                missed += 1
        for _ in left:
            await queue.put(None)

    async def each(
        self,
        source: ChunkSource,
        keys: Sequence[bytes],
        layers: int,
        timeout: float | None,
        silence: float | None = None,
    ) -> AsyncGenerator[Fetched | None, None]:
        """One result for each key, in order. `timeout` bounds a chunk, `silence` each of its messages."""
        stub: rpc.ChunkSourceServiceAsyncStub = rpc.ChunkSourceServiceStub(self._channels.get(source.address))
        for i in range(0, len(keys), MAX_KEYS):
            request = pb.GetChunksRequest(keys=keys[i : i + MAX_KEYS], quality_layers=layers)
            async with stream(stub.GetChunks(request)) as call:
                parts = aiter(call)
                for key in request.keys:
                    async with asyncio.timeout(timeout):
                        found = await receive(parts, key, self._limit, silence)
                    yield found


class BrokenStream(Exception):
    """A source that does not keep to the protocol."""


async def receive(
    parts: AsyncIterator[pb.GetChunksResponse], key: bytes, limit: int, silence: float | None = None
) -> Fetched | None:
    """One chunk from a GetChunks stream; nothing is allocated on the word of the source. `silence` in seconds.

    Raises:
        BrokenStream, TimeoutError, grpc.aio.AioRpcError: nothing more is to be had from this stream.
    """
    began = time.monotonic()
    header = (await _next(parts, "header", silence)).header
    waited = time.monotonic() - began
    if header.key != key:
        raise BrokenStream("chunks out of order")
    if header.status != pb.CHUNK_STATUS_OK:
        return None
    left = header.size
    if not 0 < left <= limit:
        raise BrokenStream(f"a chunk of {left} bytes")
    frames: list[bytes] = []
    while left:
        frames.append((await _next(parts, "data", silence)).data)
        left -= len(frames[-1])
        if not frames[-1] or left < 0:
            raise BrokenStream("a chunk of another size than its header says")
    seconds = time.monotonic() - began
    return Fetched(b"".join(frames), seconds, waited, tuple(header.layer_ends), header.codec_id)


async def _next(parts: AsyncIterator[pb.GetChunksResponse], kind: str, silence: float | None) -> pb.GetChunksResponse:
    async with asyncio.timeout(silence):
        part = await anext(parts, None)
    if part is None or part.WhichOneof("part") != kind:
        raise BrokenStream(f"no {kind} where one is due")
    return part


def name(source: ChunkSource) -> str:
    """For the log."""
    return f"source {source.worker_id} at {source.address}"
