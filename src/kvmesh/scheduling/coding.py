"""How long encoding or decoding takes, learnt from what was: seconds an element, for each quality. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

SMOOTHING = 0.3
"""Weight of the newest measurement."""


@dataclass(slots=True)
class CodingSpeed:
    """Of a pool of `width` threads. A quality is (codec, layers).

    For one not measured the nearest stands in, the slower the more layers are missing: a guess must not look free.
    """

    width: int = 1
    backlog: float = 0.0
    """Seconds of work that wait for the pool."""
    _per_element: dict[tuple[Hashable, int], float] = field(default_factory=dict)

    def seconds(self, codec: Hashable, layers: int, elements: int) -> float:
        """What so many elements keep the pool busy, while there is other work for its other threads."""
        known = [each for each in self._per_element if each[0] == codec]
        nearest = min(known, key=lambda each: abs(each[1] - layers), default=None)
        if nearest is None:
            return 0.0
        more = max(1.0, layers / nearest[1]) if nearest[1] else 1.0
        return elements * self._per_element[nearest] * more / self.width

    def observe(self, codec: Hashable, layers: int, elements: int, seconds: float) -> None:
        """One thread took so long."""
        seen, key = seconds / max(1, elements), (codec, layers)
        last = self._per_element.get(key, seen)
        self._per_element[key] = last + SMOOTHING * (seen - last)
