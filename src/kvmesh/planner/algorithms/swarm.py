"""SWARM's placement (Ryabinin et al., ICML 2023) as Helix runs it: equal stages, as few as fit the smallest host.

Hosts are dealt, fastest first, to the stage that has the least throughput so far. Links are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.errors import InvalidArgument
from kvmesh.planner.world import Problem, Span


def place(problem: Problem, bound: float, seconds: float) -> Mapping[int, Span]:
    hosts = [host for host, table in enumerate(problem.throughput) if table]
    smallest = min(problem.max_layers(host) for host in hosts)
    layers = max(k for k in range(1, smallest + 1) if problem.layers % k == 0)
    stages = problem.layers // layers
    if stages > len(hosts):
        raise InvalidArgument(f"swarm needs {stages} hosts for stages of {layers} layers, and there are {len(hosts)}")
    rates = [0.0] * stages
    spans = {}
    for rate, host in sorted(((problem.throughput[host][layers - 1], host) for host in hosts), reverse=True):
        stage = rates.index(min(rates))
        rates[stage] += rate
        spans[host] = (stage * layers, (stage + 1) * layers)
    return spans
