"""Whole runs with Helix's settings: offline as full as KV allows, online at a rate; Helix's way or ours.

Offline, Helix feeds whenever a layer has room and drops what finds no path; ours keeps half as many prompts under way
as there are hosts and drops nothing. All else is equal: profiles, links, KV room, marks, lengths, seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf

from kvmesh.planner.pipelines import trace
from kvmesh.planner.pipelines.execution import HELIX, Execution
from kvmesh.planner.pipelines.feeds import Backlog, Offline, Online, Population, arrivals
from kvmesh.planner.pipelines.outcome import Outcome
from kvmesh.planner.pipelines.simulation import Deployment, Feed, Simulation
from kvmesh.planner.world import Workload
from kvmesh.scheduling.interleaved import (
    OFFLINE,
    ONLINE,
    InterleavedRoundRobin,
    Marks,
    PipelineScheduler,
    RandomRoutes,
    ShortestQueueRoutes,
    SwarmRoutes,
    Topology,
)

WARM_UP, MEASURED, ONLINE_SECONDS = 60.0, 600.0, 1800.0
HOSTS_PER_PROMPT = 2

Make = Callable[[Topology, Marks, Callable[[int], int]], PipelineScheduler]

SCHEDULERS: Mapping[str, Make] = {
    "round-robin": lambda topology, marks, waiting: InterleavedRoundRobin(topology, marks),
    "random": lambda topology, marks, waiting: RandomRoutes(topology, marks),
    "swarm": lambda topology, marks, waiting: SwarmRoutes(topology, marks),
    "shortest-queue": lambda topology, marks, waiting: ShortestQueueRoutes(topology, marks, waiting),
}


def offline(
    deployment: Deployment,
    topology: Topology,
    workload: Workload,
    execution: Execution = HELIX,
    scheduler: str = "round-robin",
    seconds: float = MEASURED,
    seed: int = 0,
    population: int | None = None,
) -> Outcome:
    """`seconds` are measured after the warm-up. With a `population`, so many requests at once and no look at the KV."""
    marks = Marks(*OFFLINE, workload.output_tokens)
    lengths = trace.lengths()
    feed: Feed = Offline(lengths, seed)
    if population is not None:
        marks, feed = replace(marks, high_water=inf), Population(lengths, population, seed)
    elif execution.chunk_tokens is not None:
        feed = Backlog(lengths, max(1, len(deployment.placement) // HOSTS_PER_PROMPT), seed)
    simulation = _simulation(deployment, topology, marks, execution, scheduler, WARM_UP)
    return simulation.run(feed, WARM_UP + seconds)


def online(
    deployment: Deployment,
    topology: Topology,
    workload: Workload,
    tokens_per_s: float,
    execution: Execution = HELIX,
    scheduler: str = "round-robin",
    seconds: float = ONLINE_SECONDS,
    seed: int = 0,
) -> Outcome:
    """Arrivals of the shipped trace at `tokens_per_s`, prompt and output together; measured from the start."""
    simulation = _simulation(deployment, topology, Marks(*ONLINE, workload.output_tokens), execution, scheduler, 0.0)
    requests = arrivals(trace.lengths(), trace.counts(), tokens_per_s, seconds, seed)
    return simulation.run(Online(requests), seconds)


def _simulation(
    deployment: Deployment, topology: Topology, marks: Marks, execution: Execution, scheduler: str, measured_from: float
) -> Simulation:
    make = SCHEDULERS[scheduler]
    return Simulation(deployment, topology, lambda t, waiting: make(t, marks, waiting), execution, measured_from)
