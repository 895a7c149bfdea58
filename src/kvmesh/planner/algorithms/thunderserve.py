"""ThunderServe (MLSys 2025): tabu search over groups and phases, their parallelism deduced, requests routed by an LP.

The search starts from groups of hosts with fast links among them, some of which prefill while the others decode.
"""

from __future__ import annotations

import time

from kvmesh.planner.groups.deduction import Pool
from kvmesh.planner.groups.neighbours import Partition, alternating, clusters
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.search import Candidate, Search
from kvmesh.planner.groups.timing import TYPICAL_BATCH
from kvmesh.planner.task import Task
from kvmesh.planner.world import Phase

TYPICAL_PROMPT = 1024


def candidates(estimator: Estimator, seconds: float, seed: int) -> list[Candidate]:
    """All that improved on those before, best last; at least the starts are weighed, however little time there is."""
    search = Search(estimator, time.monotonic() + seconds, seed)
    return search.run(starts(estimator))


def starts(estimator: Estimator) -> list[Partition]:
    """Every split of the clusters into those that prefill and those that decode, and all of them mixed.

    Clusters that compute fast for what they read come first: prompts want arithmetic, tokens want bandwidth.
    """
    task = estimator.task

    def ratio(pool: Pool) -> float:
        return sum(arithmetic(task, host) for host, _ in pool) / len(pool)

    pools = sorted(clusters(task), key=lambda pool: (-ratio(pool), sorted(pool)))
    splits = [alternating(pools, prefill) for prefill in range(1, len(pools))]
    return [frozenset((pool, Phase.MIXED) for pool in pools), *splits]


def arithmetic(task: Task, host: int) -> float:
    """How much faster a host computes a prompt than its tokens, compared with others."""
    latency = task.speeds.latency(task.hosts[host].accelerator, 1)
    return latency.decode(TYPICAL_BATCH, round(TYPICAL_BATCH * task.context)) / latency.prefill([TYPICAL_PROMPT])
