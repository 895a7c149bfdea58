"""Chunks that this instance has come to own, copied from those who have them: after it joined, or another was lost.

Only what more than one request has asked for, only where there is room, and no faster than `rate`. Nothing depends on
it: readers ask former owners meanwhile (`kvmesh.kv.ticket`). Whoever had a chunk keeps it until it is evicted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from typing import NoReturn

from kvmesh.kv.admin import Filter, StoreAdmin
from kvmesh.kv.reading import Channels, Reader
from kvmesh.kv.silence import Silence
from kvmesh.kv.ticket import ranking
from kvmesh.registry.directory import StaticDirectory
from kvmesh.types import ChunkSource, Role, WorkerInfo
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh_kvstore.chunks import Offer
from kvmesh_kvstore.vault import Vault

CHUNK_SECONDS = 10.0
"""What one chunk may take."""
log = logging.getLogger(__name__)


class Puller:
    """`me`: this instance. `replicas`: owners of a chunk, as the router has it. `rate` in bytes a second."""

    def __init__(self, vault: Vault, channels: Channels, me: str, *, replicas: int, rate: float) -> None:
        self._vault, self._channels, self._me = vault, channels, me
        self._replicas, self._rate = replicas, rate
        self._reader = Reader(channels, Silence())

    async def run(self, directory: StaticDirectory, delay: float) -> NoReturn:
        """Pulls whenever the mesh has other stores than before, `delay` seconds after that was seen."""
        known: set[tuple[str, int]] = set()
        while True:
            stores = directory.workers(Role.KVSTORE)
            seen = {(store.worker_id, store.epoch) for store in stores}
            if seen != known and any(store.worker_id == self._me for store in stores):
                await asyncio.sleep(delay)
                known = seen
                await self.pull(stores)
            else:
                await directory.wait_for_change()

    async def pull(self, stores: Sequence[WorkerInfo]) -> int:
        """One round; how many chunks were taken over."""
        sources = [ChunkSource(store.worker_id, store.address) for store in stores]
        admin = StoreAdmin(self._channels, [store for store in stores if store.worker_id != self._me])
        taken = 0
        for name, chunks in (await admin.chunks(Filter())).items():
            source = next(source for source in sources if source.worker_id == name)
            # What is to go first is listed first, continuations before their prefixes.
            wanted = [chunk for chunk in reversed(chunks) if self._lacks(chunk, sources)]
            taken += await self._take_over(source, wanted)
        if taken:
            log.info("took over %d chunks", taken)
        return taken

    def _lacks(self, chunk: pb.StoredChunk, sources: Sequence[ChunkSource]) -> bool:
        """Ought this instance to have it?"""
        if chunk.tail or not chunk.hot or self._vault.store.peek(chunk.key):
            return False
        owners = ranking(chunk.key, sources)[: self._replicas]
        return self._me in (sources[owner].worker_id for owner in owners)

    async def _take_over(self, source: ChunkSource, chunks: Sequence[pb.StoredChunk]) -> int:
        """From one instance, until it fails or there is no more room here."""
        taken = 0
        try:
            async with aclosing(self._reader.each(source, [c.key for c in chunks], 0, CHUNK_SECONDS)) as results:
                for chunk in chunks:
                    if (found := await anext(results)) is None:
                        continue
                    if not await self._vault.adopt(_offer(chunk, len(found.bits)), found.bits):
                        break
                    taken += 1
                    await asyncio.sleep(len(found.bits) / self._rate)
        except Exception as error:
            log.warning("no more chunks from %s: %s", source.worker_id, error or type(error).__name__)
        return taken


def _offer(chunk: pb.StoredChunk, size: int) -> Offer:
    return Offer(chunk.key, chunk.fingerprint, size, chunk.parent_key, tenant=chunk.tenant)
