"""How fast a source's link is, from the transfers that several requests make over it at once.

Each transfer is charged the time that it had the link for itself: while n share it, a second counts 1/n for each. The
sum over the transfers is exactly the time that the link was busy, in whatever order the bytes came; so bytes over
charged time is the link's throughput, neither one transfer's share of it nor too much. A harmonic mean: a link that
slows down is noticed with the first chunk. Pure: told the time, and knows no bytes but their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY = 0.5
"""What earlier transfers weigh after one more."""
SPELL = 1 << 20
"""Bytes over which the capacity is measured: fewer pass in one burst, or in less time than it takes to ask for them."""
HALVING = 0.3
"""Seconds of a busy link in which an older capacity loses half: bytes prove a fast link, and time a slow one."""
FAST = 300e6
"""Bytes per second from which on a link keeps the processors at its ends so busy that coding has no time to spare."""
SMALLEST = 1024
"""Bytes below which a transfer measures the way there and back, and not the link."""


@dataclass(slots=True)
class Link:
    """Of one source. Every `begin` needs its `end`. Times: seconds of one monotonic clock."""

    requests: int = 0
    """How many are streaming over it now: each may expect its share."""
    latency: float = 0.0
    """Of a call that carries nothing, in seconds; the least seen lately."""
    _active: int = 0
    _clock: float = 0.0
    _read_at: float = 0.0
    _bytes: float = 0.0
    _busy: float = 0.0
    _spell_bytes: float = 0.0
    _spell_busy: float = 0.0
    _peak: float = 0.0

    @property
    def throughput(self) -> float | None:
        """Bytes per second of the whole link; None until measured."""
        return self._bytes / self._busy if self._bytes and self._busy else None

    @property
    def capacity(self) -> float | None:
        """Bytes per second that it has carried lately at its best: a busy reader makes a link look slow, never fast."""
        return self._peak or self.throughput

    @property
    def fast(self) -> bool:
        """Lately, that is: one stall and it is no longer."""
        return (self.throughput or 0.0) >= FAST

    @property
    def share(self) -> float | None:
        """Bytes per second that one of its requests may expect."""
        return None if self.throughput is None else self.throughput / max(1, self.requests)

    def begin(self, now: float) -> float:
        """A transfer begins; what is returned belongs to its `end`."""
        self._advance(now)
        self._active += 1
        return self._clock

    def end(self, begun: float, size: int | None, now: float) -> None:
        """It brought `size` bytes; 0 if it stalled, which counts against the link; None if it was cut short."""
        self._advance(now)
        self._active -= 1
        self._note(self._clock - begun, size)

    def streamed(self, seconds: float, size: int) -> None:
        """Bytes of an endless transfer took so long, whose request had the link for its share of the time; 0: none."""
        self._note(seconds / max(1, self.requests), size)

    def _note(self, charged: float, size: int | None) -> None:
        if charged > 0 and size is not None and (not size or size >= SMALLEST):
            self._bytes = DECAY * self._bytes + size
            self._busy = DECAY * self._busy + charged
            self._spell(size, charged)

    def answered(self, seconds: float) -> None:
        """A call that carried nothing took so long."""
        self.latency = min(seconds, 2 * self.latency) if self.latency else seconds

    def _spell(self, size: int, charged: float) -> None:
        self._spell_bytes += size
        self._spell_busy += charged
        if self._spell_bytes >= SPELL:
            faded = self._peak * math.pow(0.5, self._spell_busy / HALVING)
            self._peak = max(self._spell_bytes / self._spell_busy, faded)
            self._spell_bytes = self._spell_busy = 0.0

    def _advance(self, now: float) -> None:
        if self._active:
            self._clock += (now - self._read_at) / self._active
        self._read_at = now
