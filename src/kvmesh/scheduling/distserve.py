"""DistServe's scheduling (OSDI'24, section 4.3): separate first-come-first-served queues, and decode that pulls.

A prompt goes to the prefill worker with the shortest queue, then to the decode worker that is least loaded. Hand-over
is pulled: the KV waits at the prefill side (in kvmesh: in the stores, under a lease) until the decode worker has
blocks for it, so a burst fills prefill memory and not the decode workers'. Prefixes and speeds play no part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvmesh.scheduling.base import FleetPolicy
from kvmesh.scheduling.load import Assignment, Load
from kvmesh.scheduling.policy import Identity, Prompt
from kvmesh.types import WorkerInfo


@dataclass(slots=True)
class DistServe(FleetPolicy):
    """See `policy.Policy`."""

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """The fewest queued tokens."""
        fleet = self.fleet
        chosen = fleet.cheapest(fleet.phases.prefill(workers), now, avoid, lambda _, load: load.prompt_tokens)
        if chosen is None:
            return None
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
        """The smallest share of KV room in use, among those with room if there are any."""
        fleet = self.fleet

        def used(worker: WorkerInfo, load: Load) -> tuple[bool, float]:
            capacity = worker.capacity.blocks * worker.capacity.block_tokens
            return fleet.room(worker) < context, load.context_tokens / (capacity or 1)

        chosen = fleet.cheapest(fleet.phases.decode(workers), now, avoid, used)
        return None if chosen is None else fleet.charge_decode(chosen, context, sequences, now, prompt, local)
