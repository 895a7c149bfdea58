"""Chunks between memory and disk. Nothing is lost by a move: the new blob is whole before the books say where it is.

Whoever calls holds the lock under which room is made.
"""

from __future__ import annotations

import logging

from kvmesh_kvstore.blobs import Blobs
from kvmesh_kvstore.chunks import Entry, Tier
from kvmesh_kvstore.eviction import Demote
from kvmesh_kvstore.store import ChunkStore

log = logging.getLogger(__name__)


class Moves:
    """Of one store."""

    def __init__(self, store: ChunkStore, blobs: Blobs) -> None:
        self._store, self._blobs = store, blobs

    async def demote(self, entry: Entry) -> None:
        if await self.write_down(entry, self._blobs.memory[entry.serial]):
            self._sink(entry)

    async def promote(self, entry: Entry, bitstream: bytes) -> None:
        """Into memory, if that has room or an older chunk can step down in its place."""
        decision = self._store.promotion(entry)
        if decision is None:
            return
        if isinstance(decision, Demote):
            victim = decision.entry
            if not await self.write_down(victim, self._blobs.memory[victim.serial]):
                return
            if self._store.promotion(entry) != decision:
                await self._blobs.delete_file(victim)
                return
            self._sink(victim)
        self._blobs.keep(entry, bitstream)
        self._store.move(entry, Tier.MEMORY)
        self._store.counters.promotions += 1
        await self._blobs.delete_file(entry)

    async def write_down(self, entry: Entry, bitstream: bytes) -> bool:
        """A file for the blob. False: it could not be written, or the chunk has been removed meanwhile."""
        stored = entry in self._store
        try:
            await self._blobs.write_down(entry, bitstream)
        except OSError as error:
            # A disk that is full or failing is not asked for more than it holds.
            log.error("cannot write to disk, which is from now on limited to what it holds: %s", error)
            self._store.disk.budget = self._store.disk.used
            self._store.disk.counters.errors += 1
            return False
        if stored and entry not in self._store:
            await self._blobs.delete_file(entry)
            return False
        return True

    def _sink(self, entry: Entry) -> None:
        self._store.move(entry, Tier.DISK)
        self._store.counters.demotions += 1
        self._blobs.forget(entry)
