"""Placements by the tokens they would decode: a closed-form estimate for all, a short simulation for the best few.

More flow is not always more tokens: KV room, rounds and batches count as well (`estimate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kvmesh.planner.algorithms import helix
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.pipelines import estimate, runs
from kvmesh.planner.pipelines.execution import CHUNKED, Execution, batch_times
from kvmesh.planner.pipelines.simulation import Deployment
from kvmesh.planner.pipelines.weights import joined
from kvmesh.planner.world import SINK, SOURCE, Edge, Problem, Span, Workload
from kvmesh.scheduling.interleaved import OFFLINE, Topology

LEVELS = (1.0, 0.9, 0.75, 0.6)
"""Shares of the bound to plan for: less flow needs fewer stages."""
SECONDS = 240.0
"""Simulated for a finalist: less would rank how fast the KV fills."""
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Ranked:
    """A placement with weights; tokens/s decoded, estimated and (for finalists) simulated."""

    deployment: Deployment
    topology: Topology
    estimated: float
    simulated: float | None = None


def candidates(problem: Problem, bound: float, seconds: float) -> list[Mapping[int, Span]]:
    """Placements of stages for several shares of the flow, the largest first, without repetition."""
    found: list[Mapping[int, Span]] = []
    for level in LEVELS:
        placement = helix.place(problem, level * bound, seconds / len(LEVELS))
        if placement not in found:
            found.append(placement)
    return found


def topologies(deployment: Deployment) -> Iterator[Topology]:
    """Weighed by a maximum flow, and evenly."""
    problem, placement = deployment.problem, deployment.placement
    flow = evaluate(problem, placement).edges
    edges = [edge for edge in problem.capacity if joined(problem, placement, edge)]
    yield deployment.topology({edge: flow.get(edge, 0.0) for edge in edges})
    yield deployment.topology()


def rank(
    deployment: Deployment,
    placements: Sequence[Mapping[int, Span]],
    workload: Workload,
    execution: Execution = CHUNKED,
    finalists: int = 3,
    seconds: float = SECONDS,
) -> list[Ranked]:
    """Best first: those simulated (for `seconds` each, 3 to 12 s of computing) before those only estimated."""
    entries = [
        Ranked(option, topology, estimated(option, topology, workload, execution))
        for option in (replace(deployment, placement=placement) for placement in placements)
        for topology in topologies(option)
    ]
    entries.sort(key=lambda entry: -entry.estimated)
    tried = [replace(entry, simulated=_simulated(entry, workload, execution, seconds)) for entry in entries[:finalists]]
    return [*sorted(tried, key=lambda entry: -(entry.simulated or 0.0)), *entries[finalists:]]


def estimated(deployment: Deployment, topology: Topology, workload: Workload, execution: Execution = CHUNKED) -> float:
    """Decode tokens/s without simulation."""
    mean = estimate.Mean(workload.input_tokens, workload.output_tokens, execution.chunk_tokens or CHUNK)
    visits = tuple(_visits(deployment, topology, mean))
    return estimate.tokens_per_s(visits, _crossings(deployment, topology), mean)


def _simulated(entry: Ranked, workload: Workload, execution: Execution, seconds: float) -> float:
    return runs.offline(entry.deployment, entry.topology, workload, execution, seconds=seconds).tokens_per_s


def _visits(deployment: Deployment, topology: Topology, mean: estimate.Mean) -> Iterator[estimate.Visit]:
    total = sum(topology.hops[SOURCE].values())
    through = dict.fromkeys(topology.rooms, 0.0)
    for _, head, flow in _used(topology):
        if head != SINK:
            through[head] += flow
    positions = mean.prompt + OFFLINE[1] * mean.output
    for host, room in topology.rooms.items():
        if through[host] > 0:
            profile = deployment.model.machines[deployment.problem.machines[host]]
            times = batch_times(profile, room.layers, deployment.model.activation_bytes)
            requests = OFFLINE[0] * room.entries / room.layers / positions
            yield estimate.Visit(times, through[host] / total, requests)


def _crossings(deployment: Deployment, topology: Topology) -> Iterator[estimate.Crossing]:
    """Every hop in proportion to its share; those without spare capacity bound the rate."""
    total = sum(topology.hops[SOURCE].values())
    for tail, head, flow in _used(topology):
        edge: Edge = (tail, head)
        share = flow / total
        seconds = deployment.cluster.links[edge].seconds
        yield estimate.Crossing(share * seconds, deployment.problem.capacity[edge] / share)


def _used(topology: Topology) -> Iterator[tuple[int, int, float]]:
    for tail, heads in topology.hops.items():
        for head, flow in heads.items():
            if flow > 0:
                yield tail, head, flow
