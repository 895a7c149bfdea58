"""Predicts how a deployment serves: discrete events, the engine's own scheduler, the router's own policies.

    outcome = simulate(deployment, arrivals, Placement(), slo=Slo(ttft=1.0, tpot=0.05))
    outcome.attainment(slo)

Pure: no asyncio, no gRPC, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmesh.planner.simulator.deployment import Arrival, Deployment, HandOver, Instance, Links
from kvmesh.planner.simulator.goodput import goodput
from kvmesh.planner.simulator.outcome import Outcome, Served, Usage
from kvmesh.planner.simulator.simulation import Progress, Simulation
from kvmesh.planner.world import Phase
from kvmesh.scheduling.policy import Policy, Slo

__all__ = [
    "Arrival",
    "Deployment",
    "HandOver",
    "Instance",
    "Links",
    "Outcome",
    "Phase",
    "Served",
    "Usage",
    "goodput",
    "simulate",
]


def simulate(
    deployment: Deployment,
    arrivals: Iterable[Arrival],
    policy: Policy,
    *,
    slo: Slo | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    literal: bool = False,
    candidates: int | None = None,
) -> Outcome:
    """Serves all arrivals, which come in order of time.

    `slo` is told to the policy. `literal`: every token and every iteration on its own, which is slow and equal.
    `candidates`: how many workers of each phase the policy is shown, drawn with `seed`; None: all, nothing is random.
    """
    simulation = Simulation(
        deployment, policy, slo or Slo(), literal=literal, progress=progress, candidates=candidates, seed=seed
    )
    return simulation.run(arrivals)
