"""Colocation with chunked prefill (Sarathi-Serve, arXiv 2403.02310; DeepSpeed-FastGen, arXiv 2401.08671).

Every worker that can do both does both: a request goes to the one with the fewest pending tokens, and its prompt is
computed there, in chunks beside the running decodes. No KV travels. How large a chunk is, is the worker's token budget.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvmesh.scheduling.base import FleetPolicy
from kvmesh.scheduling.load import Assignment, Load
from kvmesh.scheduling.policy import Identity, Prompt
from kvmesh.types import WorkerInfo


@dataclass(slots=True)
class Chunked(FleetPolicy):
    """See `policy.Policy`. Workers that only prefill take no part."""

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """Nobody: the decode worker computes it."""
        return None

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
        """The fewest pending tokens: prompts not yet computed, and what running requests usually still get."""
        fleet = self.fleet
        pool = [worker for worker in workers if worker.role.decodes]

        def pending(worker: WorkerInfo, load: Load) -> tuple[bool, float]:
            own = prompt.tokens - fleet.hit(worker, prompt) if prompt else 0
            return fleet.room(worker) < context, load.prompt_tokens + own + load.sequences * fleet.mean_output

        chosen = fleet.cheapest(pool, now, avoid, pending)
        return None if chosen is None else fleet.charge_decode(chosen, context, sequences, now, prompt, local)
