"""What was stored and evicted, for whoever wants to follow.

A bounded ring: a watcher who falls behind it is told so (RESET) and goes on from now; nobody's slowness costs memory.
Knows no chunk beyond its key and size, and no wire.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import StrEnum

from kvmesh.errors import Overloaded


class EventType(StrEnum):
    STORED = "stored"
    EVICTED = "evicted"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class ChunkEvent:
    """`sequence` grows by one with each event of an epoch, from 1."""

    sequence: int
    type: EventType
    key: bytes = b""
    size: int = 0


class EventLog:
    """Belongs to one event loop."""

    def __init__(self, capacity: int = 65_536, max_watchers: int = 64) -> None:
        self._ring: deque[ChunkEvent] = deque(maxlen=capacity)
        self.last = 0
        self.watchers, self._max_watchers = 0, max_watchers
        self._news = asyncio.Event()
        self._closed = False

    def publish(self, type: EventType, key: bytes, size: int) -> None:
        self.last += 1
        self._ring.append(ChunkEvent(self.last, type, key, size))
        self._notify()

    def close(self) -> None:
        """Ends every watch once it has seen what there is."""
        self._closed = True
        self._notify()

    async def watch(self, after: int) -> AsyncGenerator[ChunkEvent, None]:
        """Events after sequence number `after`. Raises Overloaded: too many watchers."""
        if self.watchers >= self._max_watchers:
            raise Overloaded(f"there are {self._max_watchers} watchers already")
        self.watchers += 1
        try:
            seen = after
            while True:
                news = self._news
                for event in self._since(seen):
                    seen = event.sequence
                    yield event
                if seen == self.last:
                    if self._closed:
                        return
                    await news.wait()
        finally:
            self.watchers -= 1

    def _since(self, seen: int) -> list[ChunkEvent]:
        """At most 256 events, so that the list stays small however far behind; RESET if the next is not in the ring."""
        oldest = self.last - len(self._ring) + 1
        if not oldest - 1 <= seen <= self.last:
            return [ChunkEvent(self.last, EventType.RESET)]
        first = seen + 1 - oldest
        return [self._ring[i] for i in range(first, min(first + 256, len(self._ring)))]

    def _notify(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
