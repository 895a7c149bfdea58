"""What all policies have in common: a fleet, and a gate before it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from math import inf

from kvmesh.scheduling.admission import Refused
from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.gate import Gate, Open
from kvmesh.scheduling.load import Assignment, Load
from kvmesh.scheduling.policy import Identity, Observation, Prompt
from kvmesh.scheduling.serving_plan import ServingPlan
from kvmesh.types import WorkerInfo


@dataclass(slots=True)
class FleetPolicy(ABC):
    """The part of `policy.Policy` that is alike in all: a policy adds `prefill` and `decode`."""

    fleet: Fleet = field(default_factory=Fleet)
    gate: Gate = field(default_factory=Open)

    def admit(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, prefilled: bool = False
    ) -> Refused | None:
        return self.gate.check(self.fleet, list(workers), prompt, now, prefilled)

    @property
    def assigned(self) -> int:
        return self.fleet.assigned

    @abstractmethod
    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None: ...

    @abstractmethod
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
    ) -> Assignment | None: ...

    def follow(self, plan: ServingPlan) -> None:
        self.fleet.phases = plan.phases

    def observe(self, observation: Observation) -> None:
        self.fleet.observe(observation)

    def suspect(self, worker: WorkerInfo, now: float) -> None:
        self.fleet.suspect(worker, now)

    def retain(self, workers: Iterable[WorkerInfo]) -> None:
        self.fleet.retain(workers)

    def check_integrity(self) -> list[str]:
        return self.fleet.check_integrity()


def least_step(
    fleet: Fleet,
    workers: Iterable[WorkerInfo],
    context: int,
    sequences: int,
    now: float,
    avoid: Collection[Identity],
    prompt: Prompt | None,
    local: bool,
) -> Assignment | None:
    """Decode where the predicted time per token keeps the SLO and the context is least; else where it is shortest.

    Workers without room for the context come last: there the request would wait for blocks.
    """
    tpot = prompt.slo.tpot if prompt else inf

    def cost(worker: WorkerInfo, load: Load) -> tuple[bool, bool, float]:
        step = fleet.step_seconds(worker, context, sequences, now)
        kept = step <= tpot
        return fleet.room(worker) < context, not kept, load.context_tokens if kept and tpot < inf else step

    chosen = fleet.cheapest(fleet.phases.decode(workers), now, avoid, cost)
    return None if chosen is None else fleet.charge_decode(chosen, context, sequences, now, prompt, local)
