"""Announcing the store's chunks in Redis, in order and in batches, and again when Redis was away.

One task writes: what is recorded and forgotten of one key cannot overtake itself. A store without Redis serves on; what
changes meanwhile is not queued but announced anew, whole, once Redis answers. Knows the index, no blob and no tier.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import suppress

from redis.exceptions import RedisError

from kvmesh.kv.index import ChunkIndex

_RETRY = 0.5
"""Seconds between attempts while Redis is away."""
log = logging.getLogger(__name__)


class Announcer:
    """`keys` gives all that is to be found under `owner`, whenever everything must be said anew."""

    def __init__(self, index: ChunkIndex, owner: str, keys: Callable[[], Collection[bytes]]) -> None:
        self._index, self._owner, self._keys = index, owner, keys
        self._pending: dict[bytes, bool] = {}
        self._wake = asyncio.Event()
        self._flushed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done (cancelled, in fact) when all that is pending now has been written, or could not be."""
        self.in_step = False
        """Does Redis know what is here?"""

    def stored(self, key: bytes) -> None:
        """To be called once the blob is whole."""
        if self.in_step:
            self._pending[key] = True
            self._wake.set()

    async def gone(self, key: bytes) -> None:
        """Returns once nobody is sent here for this chunk any more, or Redis is found to be away: the blob may go."""
        if self.in_step:
            self._pending[key] = False
            self._wake.set()
            await asyncio.wait([self._flushed])

    async def run(self) -> None:
        """Writes until cancelled."""
        away = False
        try:
            while True:
                try:
                    await self._flush()
                    away = False
                except (RedisError, OSError, TimeoutError) as error:
                    if not away:
                        log.warning("the index in Redis is away, the store serves on: %s", error)
                    away, self.in_step = True, False
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._index.ttl / 3 if self.in_step else _RETRY):
                        await self._wake.wait()
        finally:
            self.in_step = False
            self._flushed.cancel()

    async def withdraw(self) -> None:
        """Nothing is to be found here from now on; best effort, for what is not refreshed expires anyway."""
        self.in_step = False
        with suppress(RedisError, OSError, TimeoutError):
            await self._index.replace(self._owner, ())

    async def _flush(self) -> None:
        self._wake.clear()
        changes, self._pending = self._pending, {}
        waiters, self._flushed = self._flushed, asyncio.get_running_loop().create_future()
        try:
            if self.in_step:
                self.in_step = await self._write(changes)
            if not self.in_step:
                self.in_step = True  # changes are noted again from here on, for they come after what `keys` says now
                await self._index.replace(self._owner, self._keys())
        finally:
            waiters.cancel()

    async def _write(self, changes: dict[bytes, bool]) -> bool:
        """False if Redis turns out to have lost what it was told before."""
        if gone := [key for key, here in changes.items() if not here]:
            await self._index.forget(self._owner, gone)
        if here := [key for key, here in changes.items() if here]:
            return await self._index.record(self._owner, here)
        return bool(gone) or not self._keys() or await self._index.refresh(self._owner)
