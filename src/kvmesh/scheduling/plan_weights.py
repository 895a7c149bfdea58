"""Follows a plan: prompts go to prefill workers, and from each to decode workers, in proportion to the plan's flows.

The turns are Helix's interleaved weighted round-robin (ASPLOS 2025, section 5), among the workers that are there, have
not failed the request, and have room for its KV. Where the plan says nothing, the least loaded one is chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from kvmesh.scheduling.base import FleetPolicy, least_step
from kvmesh.scheduling.load import Assignment
from kvmesh.scheduling.policy import Ended, Identity, Observation, Prompt, identity
from kvmesh.scheduling.serving_plan import COORDINATOR, RoundRobin, ServingPlan
from kvmesh.types import WorkerInfo


@dataclass(slots=True)
class PlanWeights(FleetPolicy):
    """See `policy.Policy`. `follow` gives it a plan; without one it balances load."""

    _turns: RoundRobin = field(default_factory=lambda: RoundRobin({}))
    _prefilled: dict[Hashable, str] = field(default_factory=dict)

    def follow(self, plan: ServingPlan) -> None:
        """From now on; what is under way stays where it is."""
        FleetPolicy.follow(self, plan)
        self._turns = plan.round_robin()

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """Whose turn it is; a worker that serves both phases in the plan computes the prompt where it decodes."""
        fleet = self.fleet
        pool = [worker for worker in fleet.phases.prefill(workers) if not fleet.phases.of(worker).decodes]
        chosen = self._turn(COORDINATOR, pool, prompt.tokens, prompt, now, avoid)
        chosen = chosen or fleet.cheapest(pool, now, avoid, lambda _, load: load.prompt_tokens)
        if chosen is None:
            return None
        if prompt.key is not None:
            self._prefilled[prompt.key] = chosen.worker_id
        work = fleet.estimate(chosen, prompt)
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
        """Whose turn it is after the worker that computed the prompt."""
        fleet, pool = self.fleet, list(workers)
        tail = self._prefilled.get(prompt.key, COORDINATOR) if prompt else COORDINATOR
        chosen = self._turn(tail, fleet.phases.decode(pool), context, prompt, now, avoid)
        if chosen is None:
            return least_step(fleet, pool, context, sequences, now, avoid, prompt, local)
        return fleet.charge_decode(chosen, context, sequences, now, prompt, local)

    def observe(self, observation: Observation) -> None:
        FleetPolicy.observe(self, observation)
        if isinstance(observation, Ended):
            self._prefilled.pop(observation.prompt.key, None)

    def _turn(
        self,
        tail: str,
        pool: Sequence[WorkerInfo],
        work: int,
        prompt: Prompt | None,
        now: float,
        avoid: Collection[Identity],
    ) -> WorkerInfo | None:
        fleet = self.fleet
        ready = {
            worker.worker_id: worker
            for worker in pool
            if identity(worker) not in avoid
            and fleet.load(worker).suspected_until <= now
            and fleet.room(worker) >= work
        }
        name = self._turns.choose(tail, list(ready), work)
        return ready[name] if name else None
