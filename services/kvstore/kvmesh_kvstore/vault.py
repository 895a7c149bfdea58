"""The store with its blobs: carries out what the books decide, and keeps blobs, books and index in step.

The order that makes it safe: a blob is whole before its entry exists, and an entry exists before the index names it; an
entry goes before the index forgets it, and the blob goes last. Blobs carry serials, so a late delete hits nothing new.
Room is made by one task at a time; all else may run beside it. Disk and checksums work in the pool.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, TypeVar

from kvmesh.errors import NotFound
from kvmesh.kv.bitstream import CorruptChunk, verify
from kvmesh_kvstore.chunks import Entry, Offer, Tier
from kvmesh_kvstore.events import EventLog, EventType
from kvmesh_kvstore.eviction import Demote, Evict, Place
from kvmesh_kvstore.index import Announcer
from kvmesh_kvstore.store import ChunkStore
from kvmesh_kvstore.tiers import DiskTier, MemoryTier

T = TypeVar("T")
log = logging.getLogger(__name__)


class PutStatus(StrEnum):
    OK = "ok"
    EXISTS = "exists"
    CORRUPT = "corrupt"
    FULL = "full"


class Vault:
    """Belongs to one event loop. `disk` goes with the disk budget of `store`: both or neither."""

    def __init__(
        self,
        store: ChunkStore,
        events: EventLog,
        pool: Executor,
        *,
        announcer: Announcer | None = None,
        disk: DiskTier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.events = store, events
        self._pool, self._announcer, self._disk, self._clock = pool, announcer, disk, clock
        self._memory: MemoryTier = {}
        self._room = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def now(self) -> float:
        return self._clock()

    async def open(self) -> None:
        """Takes in what the disk has kept. Raises Unavailable."""
        if self._disk is None:
            return
        await self._in_pool(self._disk.open)
        for found in await self._in_pool(self._disk.scan):
            entry = Entry(found.offer, found.serial, Tier.DISK)
            if not self.store.restore(entry):
                await self._delete(entry)
        while surplus := self.store.excess():
            self.store.remove(surplus)
            await self._delete(surplus)

    async def close(self) -> None:
        """Waits for what is under way; what is on disk stays."""
        await self.settle()
        if self._disk is not None:
            self._disk.close()

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
        if not await self._in_pool(_sound, bitstream, offer.size):
            return PutStatus.CORRUPT
        return await asyncio.shield(self._background(self._admit(offer, bitstream, lease_id)))

    async def _admit(self, offer: Offer, bitstream: bytes, lease_id: str | None) -> PutStatus:
        async with self._room:
            if self.store.exists(offer, lease_id, self.now):
                return PutStatus.EXISTS
            entry = await self._write(offer, bitstream, lease_id)
            if entry is None:
                return PutStatus.FULL
            try:
                self.store.insert(entry, lease_id, self.now)
            except NotFound:
                await self._delete(entry)
                raise
            self._announce(entry)
            return PutStatus.OK

    async def _write(self, offer: Offer, bitstream: bytes, lease_id: str | None) -> Entry | None:
        """A blob in the tier that has room for it, once room has been made; None if there can be none."""
        while decision := self.store.place(offer.size):
            match decision:
                case Place(Tier.MEMORY):
                    entry = self.store.draft(offer, Tier.MEMORY, lease_id)
                    self._memory[entry.serial] = bitstream
                    return entry
                case Place(Tier.DISK):
                    entry = self.store.draft(offer, Tier.DISK, lease_id)
                    if await self._write_down(entry, bitstream):
                        return entry
                case Evict(victim):
                    self.store.counters.evictions += 1
                    await self._evict(victim)
                case Demote(victim):
                    await self._demote(victim)
        return None

    def _announce(self, entry: Entry) -> None:
        if entry.owner is None:
            self.events.publish(EventType.STORED, entry.key, entry.size)
            if self._announcer is not None:
                self._announcer.stored(entry.key)

    # Reading

    async def read(self, key: bytes) -> bytes | None:
        """The bitstream of a chunk, verified just now. None: not here, or found damaged and dropped."""
        entry = self.store.get(key)
        bitstream = None
        if entry is not None:
            with _reading(entry):
                bitstream = await self._load(entry)
        if bitstream is None:
            self.store.counters.misses += 1
        else:
            self.store.counters.hits += 1
        return bitstream

    async def _load(self, entry: Entry) -> bytes | None:
        from_disk = entry.tier is Tier.DISK
        bitstream = await self._fetch(entry)
        if bitstream is not None and await self._in_pool(_sound, bitstream, entry.size):
            if from_disk and not self._room.locked():
                self._background(self._promote(entry, bitstream))
            return bitstream
        if entry in self.store:
            log.error("chunk %s was damaged in %s and is dropped", entry.key.hex(), entry.tier)
            self.store.counters.damaged += 1
            await asyncio.shield(self._background(self._evict(entry)))
        return None

    async def _fetch(self, entry: Entry) -> bytes | None:
        """The blob, where it is now: it may move from disk to memory while the file is being opened."""
        for _ in Tier:
            if entry.tier is Tier.MEMORY:
                return self._memory.get(entry.serial)
            try:
                return await self._in_pool(self._files.read, entry)
            except FileNotFoundError:
                continue
            except OSError:
                log.exception("cannot read chunk %s", entry.key.hex())
                return None
        return None

    # Moving and going

    async def _demote(self, entry: Entry) -> None:
        if await self._write_down(entry, self._memory[entry.serial]):
            self._sink(entry)

    async def _promote(self, entry: Entry, bitstream: bytes) -> None:
        """Into memory, if that has room or an older chunk can step down in its place. Nothing is lost for it."""
        async with self._room:
            decision = self.store.promotion(entry)
            if decision is None:
                return
            if isinstance(decision, Demote):
                victim = decision.entry
                if not await self._write_down(victim, self._memory[victim.serial]):
                    return
                if self.store.promotion(entry) != decision:
                    await self._in_pool(self._files.delete, victim)
                    return
                self._sink(victim)
            self._memory[entry.serial] = bitstream
            self.store.move(entry, Tier.MEMORY)
            self.store.counters.promotions += 1
            await self._in_pool(self._files.delete, entry)

    def _sink(self, entry: Entry) -> None:
        self.store.move(entry, Tier.DISK)
        self.store.counters.demotions += 1
        del self._memory[entry.serial]

    async def _write_down(self, entry: Entry, bitstream: bytes) -> bool:
        """A file for the blob. False: it could not be written, or the chunk has been removed meanwhile."""
        stored = entry in self.store
        try:
            await self._in_pool(self._files.write, entry, bitstream)
        except OSError as error:
            # A disk that is full or failing is not asked for more than it holds.
            log.error("cannot write to disk, which is from now on limited to what it holds: %s", error)
            self.store.disk.budget = self.store.disk.used
            return False
        if stored and entry not in self.store:
            await self._in_pool(self._files.delete, entry)
            return False
        return True

    async def _evict(self, entry: Entry) -> None:
        if not self.store.remove(entry):
            return
        if entry.owner is None:
            self.events.publish(EventType.EVICTED, entry.key, entry.size)
            if self._announcer is not None:
                await self._announcer.gone(entry.key)
        await self._delete(entry)

    def _discard(self, tails: Iterable[Entry]) -> None:
        for entry in tails:
            if self._memory.pop(entry.serial, None) is None:
                self._background(self._delete(entry))

    async def _delete(self, entry: Entry) -> None:
        if self._memory.pop(entry.serial, None) is None:
            await self._in_pool(self._files.delete, entry)

    # Checking

    async def check_integrity(self) -> list[str]:
        """What is wrong with books and blobs; empty is good."""
        await self.settle()
        async with self._room:
            errors = self.store.check_integrity()
            up = {entry.serial: entry.size for entry in self.store.memory.entries.values()}
            if up != {serial: len(blob) for serial, blob in self._memory.items()}:
                errors.append("the blobs in memory are not those in the books")
            return errors if self._disk is None else [*errors, *await self._disk_errors()]

    async def _disk_errors(self) -> list[str]:
        before = {entry.serial for entry in self.store.disk.entries.values()}
        files = await self._in_pool(self._files.serials)
        after = {entry.serial for entry in self.store.disk.entries.values()}
        errors = []
        if lost := (before & after) - files:
            errors.append(f"{len(lost)} chunks on disk have no file")
        if stray := files - (before | after):
            errors.append(f"{len(stray)} files on disk belong to no chunk")
        return [] if self._tasks else errors

    # Running things elsewhere

    @property
    def _files(self) -> DiskTier:
        assert self._disk is not None, "a disk budget without a disk"
        return self._disk

    async def _in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, NotFound):
            log.error("background work failed", exc_info=error)


@contextmanager
def _reading(entry: Entry) -> Iterator[None]:
    entry.readers += 1
    try:
        yield
    finally:
        entry.readers -= 1


def _sound(bitstream: bytes, size: int) -> bool:
    try:
        verify(bitstream)
    except CorruptChunk:
        return False
    return len(bitstream) == size
