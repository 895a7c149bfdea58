"""The messages of one response stream, with a heartbeat wherever the stream would be silent.

Knows neither what the messages say nor who reads them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, Self, TypeVar

M = TypeVar("M")


class Outbox(Generic[M]):
    """`async with` it: `progress()` is sent whenever nothing was sent for `every` seconds, and `at_once` if so told.

    `alive`: heartbeats stop while it says False, so that a worker whose engine hangs is taken for lost.
    """

    def __init__(
        self,
        write: Callable[[M], Awaitable[None]],
        progress: Callable[[], M],
        alive: Callable[[], bool],
        every: float = 0.5,
        at_once: bool = True,
    ) -> None:
        self._write = write
        self._progress = progress
        self._alive = alive
        self._every = every
        self._at_once = at_once
        self._turn = asyncio.Lock()
        self._sent = time.monotonic()

    async def __aenter__(self) -> Self:
        if self._at_once:
            await self.send(self._progress())
        self._beat = asyncio.create_task(self._keep_beating())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._beat.cancel()
        await asyncio.wait([self._beat])

    async def send(self, message: M) -> None:
        """Returns when the transport has taken the message: a slow reader makes this wait, and nothing else."""
        async with self._turn:
            await self._write(message)
            self._sent = time.monotonic()

    async def _keep_beating(self) -> None:
        delay = self._every
        while True:
            await asyncio.sleep(delay)
            silence = time.monotonic() - self._sent
            delay = self._every - silence if silence < self._every else self._every
            if silence >= self._every and self._alive() and not self._turn.locked():
                await self.send(self._progress())
