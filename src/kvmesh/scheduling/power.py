"""POLCA: two thresholds on the power of a row, for more servers than the budget holds at their peaks.

Above the first threshold low-priority workers are capped; above the second they are capped harder and, if that did not
do after its time, high-priority ones too; above the budget all are braked at once. Caps go one level at a time, when
the power has stayed well below what set them: no oscillation. (Patel et al., ASPLOS 2024.) Where clocks may not be set,
the same levels admit fewer requests, low priority first. Pure: watts and time in, a level out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from kvmesh.errors import KvmeshError

FULL_CLOCK = 1.0


class Level(IntEnum):
    """How far things have gone; each includes those before it."""

    FREE = 0
    LOW = 1
    """Low priority capped."""
    LOW_HARD = 2
    """Low priority capped harder."""
    ALL = 3
    """High priority capped, too."""
    BRAKE = 4
    """Everyone at the lowest clock, until the power is safe."""


@dataclass(frozen=True, slots=True)
class Cap:
    """What a worker may do: `clock` is a share of its highest clock, `admission` of the requests it runs at most."""

    clock: float = FULL_CLOCK
    admission: float = 1.0


# POLCA's clocks on an A100: 1275, 1110, 1305 and 288 of 1410 MHz.
LOW_CAPS = (Cap(), Cap(1275 / 1410, 0.75), Cap(1110 / 1410, 0.5), Cap(1110 / 1410, 0.25), Cap(288 / 1410, 0.0))
HIGH_CAPS = (Cap(), Cap(), Cap(), Cap(1305 / 1410, 0.75), Cap(288 / 1410, 0.25))


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Shares of the budget, and seconds. `settle`: how long a cap takes to show, at most; `hold`: how long the power
    must stay `margin` below the threshold of a level before that level is left."""

    first: float = 0.80
    second: float = 0.89
    margin: float = 0.05
    settle: float = 5.0
    hold: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.margin < self.first < self.second < 1:
            raise ValueError("thresholds must be 0 < margin < first < second < 1")

    def of(self, level: Level) -> float:
        """Below this share a level is not needed."""
        return self.first if level <= Level.LOW else self.second


@dataclass(slots=True)
class PowerPolicy:
    """Feed it with `decide` as often as power is measured; times are seconds of one monotonic clock."""

    budget_watts: float
    thresholds: Thresholds = Thresholds()
    level: Level = Level.FREE
    _changed: float = field(default=float("-inf"))
    _calm_since: float | None = None

    def decide(self, watts: float, now: float) -> Level:
        """The level from now on."""
        share = watts / self.budget_watts
        wanted = self._wanted(share, now)
        if wanted > self.level:
            self._set(wanted, now)
        elif self._calm(share, now):
            self._set(Level(self.level - 1), now)
        return self.level

    def cap(self, low_priority: bool) -> Cap:
        return (LOW_CAPS if low_priority else HIGH_CAPS)[self.level]

    def _wanted(self, share: float, now: float) -> Level:
        """The level that this power asks for; high priority is touched only when the last cap has had its time."""
        if share > 1:
            return Level.BRAKE
        if share > self.thresholds.second:
            settled = now - self._changed >= self.thresholds.settle
            return Level.ALL if self.level >= Level.LOW_HARD and settled else Level.LOW_HARD
        return Level.LOW if share > self.thresholds.first else Level.FREE

    def _calm(self, share: float, now: float) -> bool:
        """Power has stayed below the level's threshold for long enough."""
        if self.level is Level.FREE or share > self.thresholds.of(self.level) - self.thresholds.margin:
            self._calm_since = None
            return False
        if self._calm_since is None:
            self._calm_since = now
        return now - self._calm_since >= self.thresholds.hold

    def _set(self, level: Level, now: float) -> None:
        self.level, self._changed, self._calm_since = level, now, None


class Actuator(Protocol):
    """Sets what a worker may do, as a simulator does; a router does it over the network (`kvmesh_router.power`)."""

    def cap(self, worker: str, cap: Cap) -> None:
        """Raises KvmeshError where it may not."""


@dataclass(slots=True)
class Row:
    """The policy over a row of workers: tells the actuator what changes, and remembers who cannot be capped."""

    policy: PowerPolicy
    actuator: Actuator
    low_priority: frozenset[str] = frozenset()
    refused: dict[str, str] = field(default_factory=dict)
    """Worker -> why its clock could not be set."""
    _applied: dict[str, Cap] = field(default_factory=dict)

    def observe(self, watts: Mapping[str, float], now: float) -> Level:
        """Decides on the sum of the workers' `watts`, and caps those whose cap changes, low priority first."""
        level = self.policy.decide(sum(watts.values()), now)
        for worker in sorted(watts, key=lambda name: (name not in self.low_priority, name)):
            self._apply(worker, self.policy.cap(worker in self.low_priority))
        self._forget(watts)
        return level

    def _apply(self, worker: str, cap: Cap) -> None:
        if self._applied.get(worker, Cap()) == cap:
            return
        self._applied[worker] = cap
        try:
            self.actuator.cap(worker, cap)
            self.refused.pop(worker, None)
        except KvmeshError as error:
            self.refused[worker] = str(error)

    def _forget(self, alive: Iterable[str]) -> None:
        for worker in self._applied.keys() - set(alive):
            del self._applied[worker]
            self.refused.pop(worker, None)
