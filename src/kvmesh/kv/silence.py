"""Which sources did not answer lately: they are asked last, or not at all where nothing depends on it.

Knows addresses and a clock. A source is given another chance after SECONDS, or as soon as it is heard of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from kvmesh.types import KvTicket

SECONDS = 3.0


class Silence:
    """Shared by all calls of one client; `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def __contains__(self, address: str) -> bool:
        return self._until.get(address, 0.0) > self._clock()

    def note(self, address: str) -> None:
        """It was asked and did not answer."""
        now = self._clock()
        self._until = {other: until for other, until in self._until.items() if until > now} | {address: now + SECONDS}

    def broken(self, address: str) -> None:
        """It answered."""
        self._until.pop(address, None)

    def last(self, ticket: KvTicket, sources: Iterable[int]) -> tuple[int, ...]:
        """In the same order, but those who are silent at the end."""
        return tuple(sorted(sources, key=lambda source: ticket.sources[source].address in self))
