"""What the router has given each worker and not yet had back.

Counters change at dispatch, first token and completion, never by polling, so they are exact the moment they are read.
Pure; knows no policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from kvmesh.types import Role, WorkerInfo

SMOOTHING = 0.2
"""Weight of the newest measurement in a worker's running mean rate."""


@dataclass(slots=True)
class Load:
    """One life of one worker.

    `rate`: a prefill worker's computed tokens per second, a decode worker's tokens per second of one sequence; None
    until measured.
    """

    tokens: float = 0.0
    sequences: int = 0
    rate: float | None = None
    last_used: int = 0
    suspected_until: float = 0.0
    assignments: set[int] = field(default_factory=set)

    def observe(self, rate: float) -> None:
        """Moves the running mean towards a new measurement."""
        if isfinite(rate) and rate > 0:
            self.rate = rate if self.rate is None else self.rate + SMOOTHING * (rate - self.rate)

    def problems(self) -> list[str]:
        """A worker without assignments must carry no load."""
        idle = not self.assignments
        if self.tokens < -1e-6 or self.sequences < 0 or (idle and (self.tokens > 1e-6 or self.sequences)):
            return [f"{self.tokens:g} tokens and {self.sequences} sequences in {len(self.assignments)} assignments"]
        return []


@dataclass(slots=True)
class Assignment:
    """One request's share of a worker's load, from dispatch on. Whoever holds it must call `finish`."""

    worker: WorkerInfo
    load: Load
    number: int
    tokens: float
    sequences: int
    hit_tokens: int = 0
    """Prompt tokens whose KV the worker probably has."""

    def __post_init__(self) -> None:
        self.load.assignments.add(self.number)
        self.load.tokens += self.tokens
        self.load.sequences += self.sequences
        self.load.last_used = self.number

    def first_token(self) -> None:
        """The prompt is computed: nothing of it is queued on a prefill worker any more. Idempotent."""
        if self.worker.role is Role.PREFILL:
            self._give_back_tokens()

    def finish(self, rate: float = 0.0) -> None:
        """Gives back all that is left; `rate` is what was measured, if anything. Idempotent."""
        if self.number not in self.load.assignments:
            return
        self.load.observe(rate)
        self._give_back_tokens()
        self.load.sequences -= self.sequences
        self.load.assignments.remove(self.number)

    def _give_back_tokens(self) -> None:
        self.load.tokens -= self.tokens
        self.tokens = 0.0
