"""What a simulation tells: of each request, of each instance, and how many requests met their objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from kvmesh.scheduling.policy import Slo


@dataclass(slots=True)
class Served:
    """One request. Times are seconds of the simulation's clock, infinite for what never came; `refused`: why, if so.

    `prefill` is empty where the decode instance computed the prompt. `hit_tokens` of it were there already.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    first_token: float = inf
    finish: float = inf
    hit_tokens: int = 0
    prefill: str = ""
    decode: str = ""
    refused: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.first_token - self.arrival

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first, hand-over and queueing included; 0 if there is but one."""
        return (self.finish - self.first_token) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    def meets(self, slo: Slo) -> bool:
        """Finished, and within both bounds."""
        return self.finish < inf and self.ttft <= slo.ttft and self.tpot <= slo.tpot


@dataclass(slots=True)
class Usage:
    """What one instance did. `prompt_tokens` it computed, `output_tokens` it decoded after first ones.

    `busy`: seconds of computing; `batch_seconds`: those times the sequences that decoded meanwhile.
    """

    name: str
    blocks: int
    busy: float = 0.0
    batch_seconds: float = 0.0
    iterations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    peak_blocks: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run. `seconds` is how long it took in its own time, `events` how many the simulator processed."""

    requests: Sequence[Served]
    instances: Sequence[Usage]
    seconds: float
    events: int
    transferred_bytes: float = 0.0

    def attainment(self, slo: Slo) -> float:
        """Share of all requests, refused ones included, that met both objectives."""
        return sum(request.meets(slo) for request in self.requests) / max(1, len(self.requests))
