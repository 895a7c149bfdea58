"""Goodput of groups as the simulator sees it: every group an instance, Poisson arrivals of the workload's requests.

A pipeline of stages is one engine with batches in all its stages at once: prompts leave it as fast as its slowest stage
computes them, and what a lone prompt needs on top, to pass through all of them, is taken off the bound on the TTFT. A
group of several shards a stage is as fast as they are together. Prompts run whole where they are alone, as DistServe
has it, and in the best of several chunks where decodes run beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.timing import Timing
from kvmesh.planner.latency.api import Chunk, Latency
from kvmesh.planner.simulator.deployment import Arrival, Deployment, HandOver, Instance, Links
from kvmesh.planner.simulator.goodput import goodput
from kvmesh.planner.simulator.simulation import Simulation
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group, Link, Phase
from kvmesh.scheduling.chunked import Chunked
from kvmesh.scheduling.distserve import DistServe
from kvmesh.scheduling.hybrid import Hybrid
from kvmesh.scheduling.policy import Policy
from kvmesh.scheduling.policy import Slo as Bounds

REQUESTS = 300
"""As in DistServe's own searches."""
TOLERANCE = 0.02
PHASE_TOLERANCE = 0.05
AMPLE = 1 << 18
WHOLE, CHUNKS = 8192, (128, 512)


@dataclass(frozen=True, slots=True)
class PipelineLatency(Latency):
    """A group's, for an engine that runs one batch at a time in its place."""

    timing: Timing

    def iteration(self, chunks: Sequence[Chunk], decodes: int, context: int) -> float:
        """Every stage works on its part of the batch: prompts one after the other, tokens side by side."""
        stages = self.timing.under_way
        if not decodes:
            return self.timing.slowest(chunks, 0, 0)
        part = max(1, round(decodes / stages))
        return self.timing.lap(chunks, part, round(context * part / decodes))


def arrivals(
    task: Task, rate: float, count: int = REQUESTS, seed: int = 0, prompts_only: bool = False
) -> list[Arrival]:
    """The same requests at every rate, only closer together."""
    random = Random(seed)
    lengths = task.workload.sample()
    times = accumulate(random.expovariate(1.0) / rate for _ in range(count))
    drawn = ((at, *random.choice(lengths)) for at in times)
    return [Arrival(at, prompt, 1 if prompts_only else max(1, output)) for at, prompt, output in drawn]


def simulated(
    estimator: Estimator,
    groups: Sequence[Group],
    *,
    start: float = 1.0,
    count: int = REQUESTS,
    tolerance: float = TOLERANCE,
) -> float:
    """Requests/s of which enough meet both SLOs together. `start` is a guess: the closer, the sooner found."""
    task = estimator.task
    policy, budgets = _policy(groups)

    def served(budget: int) -> float:
        return goodput(
            lambda: deployment(estimator, groups, budget),
            lambda rate: arrivals(task, rate, count),
            policy,
            _bounds(estimator, groups),
            task.slo.attainment,
            start=start,
            tolerance=tolerance,
        )

    return max(map(served, budgets))


def attained(estimator: Estimator, groups: Sequence[Group], rate: float, count: int = REQUESTS) -> float:
    """Share of the requests that meet both SLOs at a rate: one run for each chunk size, far cheaper than a search."""
    policy, budgets = _policy(groups)
    bounds, load = _bounds(estimator, groups), arrivals(estimator.task, rate, count)
    runs = (Simulation(deployment(estimator, groups, budget), policy(), bounds) for budget in budgets)
    return max(run.run(load).attainment(bounds) for run in runs)


def _policy(groups: Sequence[Group]) -> tuple[Callable[[], Policy], tuple[int, ...]]:
    """The scheduling that fits the phases, and the token budgets to try."""
    phases = {group.phase for group in groups}
    if Phase.MIXED not in phases:
        return DistServe, (WHOLE,)
    return (Hybrid if Phase.PREFILL in phases else Chunked), CHUNKS


@dataclass(frozen=True, slots=True)
class Instant(Latency):
    """Takes no time: the other phase, when only one is of interest."""

    def iteration(self, chunks: Sequence[Chunk], decodes: int, context: int) -> float:
        return 1e-9 if chunks or decodes else 0.0


def simulated_phase(estimator: Estimator, group: Group, attainment: float, start: float) -> float:
    """Requests/s of one group that prefills or decodes, of which `attainment` meet the SLO of that phase."""
    task = estimator.task
    prefills = group.phase is Phase.PREFILL
    other = Phase.DECODE if prefills else Phase.PREFILL
    instances = [
        _instance(estimator.timing(group), "own", WHOLE),
        Instance("other", other, Instant(), kv_tokens=AMPLE, token_budget=AMPLE, max_running=AMPLE),
    ]
    bounds = _bounds(estimator, [group])
    return goodput(
        lambda: Deployment(instances),
        lambda rate: arrivals(task, rate, prompts_only=prefills),
        DistServe,
        Bounds(ttft=bounds.ttft) if prefills else Bounds(tpot=bounds.tpot),
        attainment,
        start=max(start, 1e-3),
        tolerance=PHASE_TOLERANCE,
    )


def deployment(estimator: Estimator, groups: Sequence[Group], budget: int) -> Deployment:
    """Links carry what all layers together would need at the pace of the slowest pair of hosts."""
    task = estimator.task
    size = task.model.layers * task.model.kv_bytes * task.kv_ratio
    names = [str(number) for number in range(len(groups))]
    pairs = {}
    for i, group in enumerate(groups):
        for j, other in enumerate(groups):
            if group.phase is Phase.PREFILL and other.phase is not Phase.PREFILL:
                seconds, delay = estimator.way(group.shards, other.shards)
                pairs[names[i], names[j]] = Link(size / max(seconds, 1e-15), delay)
    return Deployment(
        [_instance(estimator.timing(group), name, budget) for name, group in zip(names, groups, strict=True)],
        Links(Link(1e15, 0.0), pairs),
        kv_bytes_per_token=size,
        hand_over=HandOver.PULL,
    )


def _instance(timing: Timing, name: str, budget: int) -> Instance:
    tokens = int(timing.max_batch * timing.task.context)
    longest = max(prompt + output for prompt, output in timing.task.workload.sample())
    return Instance(
        name,
        timing.group.phase,
        PipelineLatency(timing),
        kv_tokens=max(tokens, longest + 64),
        token_budget=budget * timing.under_way if timing.group.phase is Phase.MIXED else WHOLE,
        max_running=max(1, timing.most_running),
    )


def _bounds(estimator: Estimator, groups: Sequence[Group]) -> Bounds:
    """What a prompt spends outside of the slowest stage passes as if it took no time: the longest of all groups."""
    slo = estimator.task.slo
    timings = [estimator.timing(group) for group in groups if group.phase is not Phase.DECODE]
    outside = max((float((timing.first_token - timing.service).mean()) for timing in timings), default=0.0)
    return Bounds(max(1e-9, slo.ttft - outside), slo.tpot)
