"""What a power meter is, and how watts come from two readings of it. Reads nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Meter(Protocol):
    """Energy that hardware counts by itself."""

    @property
    def domain(self) -> str:
        """What is measured. Two meters of one domain measure the same joules: add only one of them."""

    def joules(self) -> float:
        """Since some moment in the past; never falls.

        Raises:
            Unavailable: it cannot be read any more.
        """


@dataclass(slots=True)
class Wattmeter:
    """Mean watts between samples, and the joules since the first one."""

    meters: Sequence[Meter]
    watts: float = 0.0
    joules: float = 0.0
    _last: tuple[float, float] | None = field(default=None)

    @property
    def domain(self) -> str:
        return "+".join(meter.domain for meter in self.meters)

    def sample(self, now: float) -> None:
        """Reads all meters; `now` in seconds of a monotonic clock. May take milliseconds: not for an event loop."""
        total = sum(meter.joules() for meter in self.meters)
        if self._last is not None and now > self._last[0]:
            spent = total - self._last[1]
            self.watts = spent / (now - self._last[0])
            self.joules += spent
        self._last = now, total
