"""Routing by the time to first token that each worker would give, prefixes included.

    TTFT = queued work + prefill(length, hit) + max(0, transfer - overlap)

the estimate of Mooncake (FAST'25, Algorithm 1): a prefix held elsewhere is fetched only where that beats computing it
again. A hot prefix is computed once more, on another worker, when the one that has it is too far behind the others
(Preble, ICLR'25; SGLang's cache-aware router): the imbalance decides, not the prefix. All in calibrated seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvmesh.scheduling.base import FleetPolicy, least_step
from kvmesh.scheduling.load import Assignment, Load
from kvmesh.scheduling.policy import Identity, Prompt
from kvmesh.types import WorkerInfo


@dataclass(slots=True)
class PrefixAware(FleetPolicy):
    """See `policy.Policy`. `regard`: what a second of work counts beyond one of waiting, for those who come later."""

    regard: float = 1.0

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """The least time to first token, with some regard for those who come later."""
        fleet, pool = self.fleet, self.fleet.phases.prefill(workers)
        works = {worker.worker_id: fleet.estimate(worker, prompt) for worker in pool}

        def cost(worker: WorkerInfo, load: Load) -> float:
            return load.wait(now) + (1.0 + self.regard) * works[worker.worker_id].seconds

        chosen = fleet.cheapest(pool, now, avoid, cost)
        if chosen is None:
            return None
        work = works[chosen.worker_id]
        return fleet.charge_prefill(chosen, prompt, now, work.tokens, work.seconds, work.hit)

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
        return least_step(self.fleet, workers, context, sequences, now, avoid, prompt, local)
