"""In which codec a chunk is published: what keeps the steps of its way to whoever reads it busy for the least time.

Chunks follow one another through encoding, putting, fetching and decoding, so the busiest step counts. A small codec
keeps decoders busy and a large one links; where both are slow, chunks take turns, and both are busy. Where nobody and
nothing is remote a chunk stays as it is, however slow things seem: a busy machine must not make KV lossy. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from kvmesh.scheduling.coding import CodingSpeed
from kvmesh.types import Readers

EXACTNESS = 0.95
"""A more exact codec is taken unless a less exact one adds at most this share of what it adds."""
FAST = 300e6
"""Bytes per second from which on a link keeps the processors at its ends so busy that coding has no time to spare."""
SMOOTHING = 0.3


@dataclass(frozen=True, slots=True)
class Links:
    """From here to the store, in bytes per second, None if not measured; and from there to its readers."""

    store_remote: bool
    store_throughput: float | None
    readers: Readers

    @property
    def remote(self) -> bool:
        return self.store_remote or self.readers.remote

    @property
    def slowest(self) -> float:
        return min(rate or math.inf for rate in (self.put, self.read))

    @property
    def put(self) -> float | None:
        return self.store_throughput if self.store_remote else None

    @property
    def read(self) -> float | None:
        """Readers of whom nothing is known are taken to be as far away as this worker, if that is far."""
        return (self.readers.bytes_per_second or self.put) if self.readers.remote else self.put


Steps = tuple[float, float, float, float]
"""Seconds that a chunk keeps each step of its way busy."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """`spare_seconds`: what encoding may take without being noticed, as the next chunk is still computed."""

    raw_bytes: int
    elements: int
    spare_seconds: float = 0.0


@dataclass(slots=True)
class Load:
    """What the chunks of one prompt have added to each step so far."""

    steps: Steps = (0.0, 0.0, 0.0, 0.0)

    def busiest(self, more: Steps = (0.0, 0.0, 0.0, 0.0)) -> float:
        return max(map(sum, zip(self.steps, more, strict=True)))

    def add(self, more: Steps) -> None:
        encoding, putting, fetching, decoding = map(sum, zip(self.steps, more, strict=True))
        self.steps = (encoding, putting, fetching, decoding)


@dataclass(slots=True)
class Publishing:
    """What one worker has learnt of its codecs: shares of the raw bytes that are stored, and of those that are read."""

    _shares: dict[Hashable, tuple[float, float]] = field(default_factory=dict)

    def observe(self, codec: Hashable, raw_bytes: int, stored_bytes: int, read_bytes: int) -> None:
        """A chunk was encoded; `read_bytes`: of its coarsest version that is fetched."""
        seen = stored_bytes / max(1, raw_bytes), read_bytes / max(1, raw_bytes)
        last = self._shares.get(codec, seen)
        stored, read = (old + SMOOTHING * (new - old) for old, new in zip(last, seen, strict=True))
        self._shares[codec] = stored, read

    def choose(
        self,
        codecs: Sequence[Hashable],
        chunk: Chunk,
        links: Links,
        coding: tuple[CodingSpeed, CodingSpeed],
        load: Load,
    ) -> int:
        """The index of the codec to publish a chunk in; `load` counts it. The first is exact, the last smallest.

        `coding`: the speeds of encoding and decoding. Links of which nothing is known are taken for slow: what is small
        serves a fast link too, what is raw no slow one.
        """
        if not links.remote:
            return 0
        if links.read is None:
            return len(codecs) - 1
        if links.slowest >= FAST:
            return 0
        steps = [self._steps(codec, number > 0, chunk, links, coding) for number, codec in enumerate(codecs)]
        busiest = [load.busiest(each) for each in steps]
        allowed = load.busiest() + (min(busiest) - load.busiest()) / EXACTNESS
        chosen = next(number for number, time in enumerate(busiest) if time <= allowed)
        load.add(steps[chosen])
        return chosen

    def _steps(
        self, codec: Hashable, coded: bool, chunk: Chunk, links: Links, coding: tuple[CodingSpeed, CodingSpeed]
    ) -> Steps:
        """Seconds of encoding, putting, fetching and decoding."""
        stored, read = self._shares.get(codec, (1.0, 1.0))
        encoding, decoding = (speed.seconds(codec, 1, chunk.elements) if coded else 0.0 for speed in coding)
        putting = stored * chunk.raw_bytes / links.put if links.put else 0.0
        fetching = read * chunk.raw_bytes / links.read if links.read else 0.0
        return (max(0.0, encoding - chunk.spare_seconds), putting, fetching, decoding)
