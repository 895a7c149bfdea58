"""The store with its blobs: carries out what the books decide, and keeps blobs, books and index in step.

The order that makes it safe: a blob is whole before its entry exists, and an entry exists before the index names it; an
entry goes before the index forgets it, and the blob goes last. Blobs carry serials, so a late delete hits nothing new.
Room is made by one task at a time; all else may run beside it. Disk and checksums work in the pool.

What is evicted may go on to the remote tier, and is looked for there when it is missed here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any, TypeVar

from kvmesh.errors import KvmeshError
from kvmesh.kv.bitstream import CorruptChunk, verify
from kvmesh_kvstore.blobs import Blobs
from kvmesh_kvstore.chunks import Entry, Offer, Tier, Traits
from kvmesh_kvstore.events import EventLog, EventType
from kvmesh_kvstore.eviction import Demote, Evict, Place
from kvmesh_kvstore.index import Announcer
from kvmesh_kvstore.integrity import problems
from kvmesh_kvstore.moves import Moves
from kvmesh_kvstore.remote import RemoteTier
from kvmesh_kvstore.store import ChunkStore

T = TypeVar("T")
log = logging.getLogger(__name__)


class PutStatus(StrEnum):
    OK = "ok"
    EXISTS = "exists"
    CORRUPT = "corrupt"
    FULL = "full"


class Vault:
    """Belongs to one event loop. `blobs` have a disk if `store` has a budget for one."""

    def __init__(
        self,
        store: ChunkStore,
        blobs: Blobs,
        events: EventLog,
        *,
        announcer: Announcer | None = None,
        remote: RemoteTier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.events, self.remote = store, events, remote
        self._blobs, self._announcer, self._clock = blobs, announcer, clock
        self._moves = Moves(store, blobs)
        self._room = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def now(self) -> float:
        return self._clock()

    async def open(self) -> None:
        """Takes in what the disk has kept. Raises Unavailable."""
        for found in await self._blobs.open():
            entry = Entry(found.offer, found.traits, found.serial, Tier.DISK)
            if not self.store.restore(entry):
                await self._blobs.delete(entry)
        while surplus := self.store.excess():
            self.store.remove(surplus)
            await self._blobs.delete(surplus)

    async def save(self, seconds: float) -> None:
        """What is wanted of the memory tier goes to the remote one, as far as there is time: this store leaves."""
        if self.remote is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.remote.save(list(self.store.memory), self._blobs.fetch)

    async def close(self) -> None:
        """Waits for what is under way; what is on disk stays."""
        await self.settle()
        self._blobs.close()

    async def settle(self) -> None:
        """Until nothing runs in the background."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # Leases

    def release(self, lease_id: str) -> bool:
        """Ends a lease, its tails with it; False if there was none."""
        tails = self.store.release(lease_id)
        self._discard(tails or ())
        return tails is not None

    def sweep(self) -> None:
        """Ends the leases that ran out."""
        self._discard(self.store.expire(self.now))

    # Coming

    async def put(self, offer: Offer, bitstream: bytes, lease_id: str | None) -> PutStatus:
        """Stores a chunk that has arrived whole; once verified it is stored even if the caller is gone.

        Raises:
            NotFound: the lease does not exist or has expired.
            InvalidArgument: a tail without a lease, or the key is of another namespace.
        """
        if self.store.exists(offer, lease_id, self.now):
            return PutStatus.EXISTS
        traits = await self._blobs.in_pool(_verified, bitstream, offer.size)
        if traits is None:
            return PutStatus.CORRUPT
        return await asyncio.shield(self._background(self._admit(offer, traits, bitstream, lease_id)))

    async def _admit(self, offer: Offer, traits: Traits, bitstream: bytes, lease_id: str | None) -> PutStatus:
        async with self._room:
            if self.store.exists(offer, lease_id, self.now):
                return PutStatus.EXISTS
            entry = await self._write(offer, traits, bitstream, lease_id)
            if entry is None:
                return PutStatus.FULL
            try:
                self.store.insert(entry, lease_id, self.now)
            except KvmeshError:
                await self._blobs.delete(entry)
                raise
            self._announce(entry)
            return PutStatus.OK

    async def _write(self, offer: Offer, traits: Traits, bitstream: bytes, lease_id: str | None) -> Entry | None:
        """A blob in the tier that has room for it, once room has been made; None if there can be none."""
        while decision := self.store.place(offer):
            match decision:
                case Place(tier):
                    entry = self.store.draft(offer, traits, tier, lease_id)
                    if tier is Tier.MEMORY:
                        self._blobs.keep(entry, bitstream)
                        return entry
                    if await self._moves.write_down(entry, bitstream):
                        return entry
                case Evict(victim):
                    await self._make_way(victim)
                case Demote(victim):
                    await self._moves.demote(victim)
        return None

    def _announce(self, entry: Entry) -> None:
        if entry.owner is None:
            self.events.publish(EventType.STORED, entry.key, entry.size)
            if self._announcer is not None:
                self._announcer.stored(entry.key)

    # Finding and reading

    async def find_missing(self, keys: Sequence[bytes], lease_id: str | None) -> list[bytes]:
        """Keys in no tier, in the order asked; chunks that are here are pinned by the lease. Raises NotFound."""
        missing = self.store.find_missing(keys, lease_id, self.now)
        if self.remote is None or not missing:
            return missing
        afar = await self.remote.find(missing)
        return [key for key in missing if key not in afar]

    async def read(self, key: bytes) -> tuple[Traits, bytes] | None:
        """A chunk and its bitstream, verified just now. None: in no tier, or found damaged and dropped."""
        entry = self.store.get(key)
        tier = entry.tier if entry else None
        chunk = await self._read_here(entry) if entry else None
        self.store.count_read(tier if chunk else None, len(chunk[1]) if chunk else 0)
        if chunk is None and self.remote is not None:
            chunk = await self._recall(self.remote, key)
        self.store.counters.hits += chunk is not None
        self.store.counters.misses += chunk is None
        return chunk

    async def _read_here(self, entry: Entry) -> tuple[Traits, bytes] | None:
        on_disk = entry.tier is Tier.DISK
        chunk = await self.verified(entry)
        if chunk is not None and on_disk and not self._room.locked():
            self._background(self._promote(entry, chunk[1]))
        return chunk

    async def verified(self, entry: Entry) -> tuple[Traits, bytes] | None:
        """The bitstream of a chunk that is here; None: it was damaged and is dropped, or it has gone meanwhile."""
        with entry.being_read():
            bitstream = await self._blobs.fetch(entry)
            traits = None if bitstream is None else await self._blobs.in_pool(_verified, bitstream, entry.size)
            if bitstream is not None and traits is not None:
                return entry.traits, bitstream
            if entry in self.store:
                log.error("chunk %s was damaged in %s and is dropped", entry.key.hex(), entry.tier)
                self.store.counters.damaged += 1
                self.store.shelf(entry.tier).counters.errors += 1
                await asyncio.shield(self._background(self.drop(entry)))
        return None

    async def adopt(self, offer: Offer, bitstream: bytes) -> bool:
        """Takes a chunk that is wanted from another instance, where there is room; False if there is none."""
        if not self.store.has_room(offer):
            return False
        traits = await self._blobs.in_pool(_verified, bitstream, offer.size)
        if traits is None:
            return True
        status = await asyncio.shield(self._background(self._admit(offer, traits, bitstream, None)))
        self.store.find_missing([offer.key], None, self.now)
        return status is not PutStatus.FULL

    async def _recall(self, remote: RemoteTier, key: bytes) -> tuple[Traits, bytes] | None:
        """From the remote tier, and back into the others."""
        if (found := await remote.get(key)) is None:
            return None
        offer, bitstream = found
        traits = await self._blobs.in_pool(_verified, bitstream, offer.size)
        if traits is None or offer.key != key:
            await remote.reject(key)
            return None
        if not self._room.locked():
            self._background(self._admit(offer, traits, bitstream, None))
        return traits, bitstream

    # Going

    async def _promote(self, entry: Entry, bitstream: bytes) -> None:
        async with self._room:
            await self._moves.promote(entry, bitstream)

    async def _make_way(self, victim: Entry) -> None:
        """Evicts; what is worth it goes on to the remote tier."""
        if self.remote is not None and self.remote.wants(victim):
            bitstream = await self._blobs.fetch(victim)
            if not self.store.free(victim):
                return  # somebody has come to need it meanwhile
            if bitstream is not None:
                self.remote.offer(victim.offer, bitstream, victim.hot)
        if self.store.evict(victim):
            await self._gone(victim)

    async def evict(self, entry: Entry) -> bool:
        """As an operator wishes; False if it must stay, or has gone."""
        async with self._room:
            return self.store.free(entry) and await self.drop(entry)

    async def drop(self, entry: Entry) -> bool:
        """Whoever pins it; False if it has gone already."""
        if not self.store.remove(entry):
            return False
        await self._gone(entry)
        return True

    async def _gone(self, entry: Entry) -> None:
        """The blob of a chunk that has left the books: first nobody is sent here for it, then it goes."""
        if entry.owner is None:
            self.events.publish(EventType.EVICTED, entry.key, entry.size)
            if self._announcer is not None:
                await self._announcer.gone(entry.key)
        await self._blobs.delete(entry)

    def _discard(self, tails: Iterable[Entry]) -> None:
        for entry in tails:
            if not self._blobs.forget(entry):
                self._background(self._blobs.delete_file(entry))

    # Checking

    async def check_integrity(self) -> list[str]:
        """What is wrong with books and blobs; empty is good."""
        await self.settle()
        async with self._room:
            errors = [*problems(self.store), *self._blobs.memory_problems(self.store.memory)]
            on_disk = await self._blobs.disk_problems(self.store.disk)
            return errors if self._tasks else [*errors, *on_disk]

    def _background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, KvmeshError):
            log.error("background work failed", exc_info=error)


def _verified(bitstream: bytes, size: int) -> Traits | None:
    try:
        header = verify(bitstream)
    except CorruptChunk:
        return None
    return Traits.of(header, size) if len(bitstream) == size else None
