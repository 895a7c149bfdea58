"""In which codec a chunk is published: what keeps the steps of its way to whoever reads it busy for the least time.

Chunks follow one another through computing, encoding, putting, fetching and decoding, so the busiest step counts: for
the request that publishes what it takes beyond computing, and for those who find the chunk stored later the busier one
of fetching and decoding. The sum of both decides. A small codec keeps decoders busy and a large one links; where both
are slow, chunks take turns, and both are busy. Where nobody and nothing is remote a chunk stays as it is, however slow
things seem: a busy machine must not make KV lossy. Pure.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from kvmesh.scheduling.coding import CodingSpeed
from kvmesh.scheduling.link import FAST
from kvmesh.types import Readers

EXACTNESS = 0.95
"""A more exact codec is taken unless a less exact one adds at most this share of what it adds."""
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
    def put(self) -> float | None:
        return self.store_throughput if self.store_remote else None

    @property
    def read(self) -> float | None:
        """Readers of whom nothing is known are taken to be as far away as this worker, if that is far."""
        return (self.readers.bytes_per_second or self.put) if self.readers.remote else self.put


Steps = tuple[float, float, float, float, float]
"""Seconds that a chunk keeps each step of its way busy: computing, encoding, putting, fetching, decoding."""
NOTHING: Steps = (0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """`compute_seconds`: what computing it takes; until then the chunk before has time to be encoded and put."""

    raw_bytes: int
    elements: int
    compute_seconds: float = 0.0


@dataclass(slots=True)
class Load:
    """What the chunks of one prompt have added to each step so far."""

    steps: Steps = NOTHING

    def cost(self, more: Steps = NOTHING) -> float:
        """Seconds: what the busiest step takes beyond computing, and once more what a later reading takes."""
        steps = self._with(more)
        return max(steps) - steps[0] + max(steps[-2:])

    def add(self, more: Steps) -> None:
        self.steps = self._with(more)

    def _with(self, more: Steps) -> Steps:
        computing, encoding, putting, fetching, decoding = map(sum, zip(self.steps, more, strict=True))
        return (computing, encoding, putting, fetching, decoding)


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
        steps = [self._steps(codec, number > 0, chunk, links, coding) for number, codec in enumerate(codecs)]
        if links.read >= FAST and max(steps[0]) == steps[0][0]:
            return 0
        costs = [load.cost(each) for each in steps]
        allowed = load.cost() + (min(costs) - load.cost()) / EXACTNESS
        chosen = next(number for number, cost in enumerate(costs) if cost <= allowed)
        load.add(steps[chosen])
        return chosen

    def _steps(
        self, codec: Hashable, coded: bool, chunk: Chunk, links: Links, coding: tuple[CodingSpeed, CodingSpeed]
    ) -> Steps:
        stored, read = self._shares.get(codec, (1.0, 1.0))
        encoding, decoding = (speed.seconds(codec, 1, chunk.elements) if coded else 0.0 for speed in coding)
        putting = stored * chunk.raw_bytes / links.put if links.put else 0.0
        fetching = read * chunk.raw_bytes / links.read if links.read else 0.0
        return (chunk.compute_seconds, encoding, putting, fetching, decoding)
