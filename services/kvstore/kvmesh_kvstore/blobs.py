"""The bitstreams of the chunks in the books: in a dict, or as files that a pool of threads reads and writes.

Knows no lease and no order of eviction; which blob lies where is what its entry says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar

from kvmesh_kvstore.chunks import Entry, Tier
from kvmesh_kvstore.tiers import DiskTier, Found, MemoryTier

T = TypeVar("T")
log = logging.getLogger(__name__)


class Blobs:
    """Belongs to one event loop. `disk`: None if there is no such tier."""

    def __init__(self, pool: Executor, disk: DiskTier | None = None) -> None:
        self.memory: MemoryTier = {}
        self._pool, self._disk = pool, disk

    async def in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def open(self) -> list[Found]:
        """What the disk has kept, the longest unused first. Raises Unavailable."""
        if self._disk is None:
            return []
        await self.in_pool(self._disk.open)
        return await self.in_pool(self._disk.scan)

    def close(self) -> None:
        """What is on disk stays."""
        if self._disk is not None:
            self._disk.close()

    def keep(self, entry: Entry, bitstream: bytes) -> None:
        """Into memory."""
        self.memory[entry.serial] = bitstream

    async def write_down(self, entry: Entry, bitstream: bytes) -> None:
        """A file, beside what may be in memory. Raises OSError."""
        await self.in_pool(self._files.write, entry, bitstream)

    async def fetch(self, entry: Entry) -> bytes | None:
        """The blob, where it is now: it may move from disk to memory while the file is being opened."""
        for _ in Tier:
            if entry.tier is Tier.MEMORY:
                return self.memory.get(entry.serial)
            try:
                return await self.in_pool(self._files.read, entry)
            except FileNotFoundError:
                continue
            except OSError:
                log.exception("cannot read chunk %s", entry.key.hex())
                return None
        return None

    def forget(self, entry: Entry) -> bool:
        """Out of memory; False if it was not there."""
        return self.memory.pop(entry.serial, None) is not None

    async def delete(self, entry: Entry) -> None:
        """Wherever it is."""
        if not self.forget(entry):
            await self.delete_file(entry)

    async def delete_file(self, entry: Entry) -> None:
        await self.in_pool(self._files.delete, entry)

    def memory_problems(self, shelf: Iterable[Entry]) -> list[str]:
        """`shelf`: what the books say is in memory."""
        sizes = {entry.serial: entry.size for entry in shelf}
        same = sizes == {serial: len(blob) for serial, blob in self.memory.items()}
        return [] if same else ["the blobs in memory are not those in the books"]

    async def disk_problems(self, shelf: Iterable[Entry]) -> list[str]:
        """`shelf`: what the books say is on disk; chunks that come or go meanwhile do not count."""
        if self._disk is None:
            return []
        before = {entry.serial for entry in shelf}
        files = await self.in_pool(self._disk.serials)
        after = {entry.serial for entry in shelf}
        errors = []
        if lost := (before & after) - files:
            errors.append(f"{len(lost)} chunks on disk have no file")
        if stray := files - (before | after):
            errors.append(f"{len(stray)} files on disk belong to no chunk")
        return errors

    @property
    def _files(self) -> DiskTier:
        assert self._disk is not None, "a disk budget without a disk"
        return self._disk
