"""KV from the store into the engine: fetched, checked, decoded and written while later chunks are still on the way.

Whatever is missing, damaged, late or of another shape is a miss, and ends the import: the rest is recomputed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass

from kvmesh.engine.api import KvArray, KvLayout
from kvmesh.errors import InvalidArgument
from kvmesh.kv import bitstream
from kvmesh.kv.client import StoreClient
from kvmesh.kv.codec import Codec, Raw
from kvmesh.types import ChunkRef, KvTicket
from kvmesh.worker.thread import EngineThread


@dataclass(frozen=True, slots=True)
class Imported:
    """KV of tokens up to `end` is in the pool, `chunks` chunks of it new; `reason`: why not all, or empty."""

    end: int
    chunks: int = 0
    reason: str = ""


class Importer:
    """`timeout`: seconds that one chunk may take. `in_flight`: fetched chunks that are not yet in the pool.

    `codec`: the one that all chunks of this worker's namespace are encoded with, raw by default.
    """

    def __init__(
        self,
        store: StoreClient,
        engine: EngineThread,
        pool: Executor,
        *,
        codec: Codec | None = None,
        timeout: float = 3.0,
        in_flight: int = 8,
    ) -> None:
        self._store = store
        self._engine = engine
        self._pool = pool
        self._codec = codec or Raw()
        self._timeout = timeout
        self._in_flight = in_flight

    async def fetch(self, request_id: str, ticket: KvTicket, chunks: Sequence[ChunkRef], local: int) -> Imported:
        """Imports `chunks`, consecutive ones of the ticket that begin at or before `local`, up to the first miss.

        When it returns, the engine has been given everything that it counts as imported.
        """
        room = asyncio.Semaphore(self._in_flight)
        imports: list[asyncio.Task[str]] = []
        try:
            async with aclosing(self._store.get(ticket, chunks, timeout_per_chunk=self._timeout)) as bitstreams:
                async for chunk, bits in bitstreams:
                    await room.acquire()
                    imports.append(asyncio.create_task(self._import(request_id, chunk, bits, room)))
                    if bits is None or any(task.done() and task.result() for task in imports):
                        break
            problems = await asyncio.gather(*imports)
        finally:
            for task in imports:
                task.cancel()
        good = next((i for i, problem in enumerate(problems) if problem), len(problems))
        end = max(local, chunks[good - 1].end) if good else local
        return Imported(end, good, problems[good] if good < len(problems) else "")

    async def _import(self, request_id: str, chunk: ChunkRef, bits: bytes | None, room: asyncio.Semaphore) -> str:
        """Why the chunk could not be used; empty if it was."""
        try:
            if bits is None:
                return f"the chunk at token {chunk.start} could not be fetched"
            loop = asyncio.get_running_loop()
            data = await loop.run_in_executor(self._pool, decode, bits, chunk, self._engine.layout, self._codec)
            await self._engine.import_kv(request_id, chunk.start, data)
            return ""
        except (bitstream.CorruptChunk, InvalidArgument) as error:
            return f"the chunk at token {chunk.start} is unusable: {error}"
        finally:
            room.release()


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
    return bitstream.decode(bits, codec).data
