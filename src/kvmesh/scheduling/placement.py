"""Placement: which worker computes a prompt, and which one generates. The policy that needs no calibration.

Argmin of an estimated time, ties broken by least recent use. A prefill candidate costs the uncached tokens queued on
it plus those of this request, divided by its measured rate: the TTFT estimate of Mooncake (FAST'25). A decode candidate
costs its active context and sequences, divided by its measured speed. Pure: does not know connections or models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from kvmesh.scheduling.base import FleetPolicy
from kvmesh.scheduling.fleet import Cost
from kvmesh.scheduling.load import Assignment, Load
from kvmesh.scheduling.policy import Identity, Prompt
from kvmesh.types import Role, WorkerInfo

STORED_COST = 0.1
"""Fetching a stored token, relative to computing it."""
SEQUENCE_COST = 256
"""One more running sequence, in tokens of context."""


@dataclass(slots=True)
class Placement(FleetPolicy):
    """See `policy.Policy`."""

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """The worker with the least estimated time to first token, charged with the prompt."""
        fleet, pool = self.fleet, self.fleet.phases.prefill(workers)
        costs = {worker.worker_id: uncached_cost(prompt, fleet.hit(worker, prompt)) for worker in pool}
        per_rate = self._per_rate(pool, Role.PREFILL, lambda worker, load: load.prompt_tokens + costs[worker.worker_id])
        chosen = fleet.cheapest(pool, now, avoid, per_rate)
        if chosen is None:
            return None
        hit = fleet.hit(chosen, prompt)
        seconds = fleet.estimate(chosen, prompt).seconds
        return fleet.charge_prefill(chosen, prompt, now, costs[chosen.worker_id], seconds, hit)

    def decode(
        self,
        workers: Iterable[WorkerInfo],
        context: int,
        sequences: int,
        now: float,
        avoid: Collection[Identity] = (),
        *,
        prompt: Prompt | None = None,
        local: bool = False,
    ) -> Assignment | None:
        """The worker with the least load for its speed, charged with `context` tokens in `sequences` samples."""
        pool = self.fleet.phases.decode(workers)
        per_rate = self._per_rate(pool, Role.DECODE, _decode_work)
        chosen = self.fleet.cheapest(pool, now, avoid, per_rate)
        return None if chosen is None else self.fleet.charge_decode(chosen, context, sequences, now, prompt, local)

    def _per_rate(self, pool: Sequence[WorkerInfo], phase: Role, work: Cost) -> Cost:
        """Work as time. A worker not yet measured is taken to be as fast as the mean of those that are."""
        rates = [rate for worker in pool if (rate := self.fleet.load(worker).rates.get(phase))]
        usual = sum(rates) / len(rates) if rates else 1.0
        return lambda worker, load: work(worker, load) / load.rates.get(phase, usual)


def _decode_work(worker: WorkerInfo, load: Load) -> float:
    return load.context_tokens + SEQUENCE_COST * (load.sequences + 1)


def uncached_cost(prompt: Prompt, hit_tokens: int) -> float:
    """Tokens to compute, and at a fraction of their cost those to fetch; the last token is always computed."""
    hit = min(hit_tokens, prompt.tokens - 1)
    stored = max(min(prompt.stored_tokens, prompt.tokens - 1) - hit, 0)
    return prompt.tokens - hit - stored * (1 - STORED_COST)
