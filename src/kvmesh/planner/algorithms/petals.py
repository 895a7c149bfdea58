"""Petals' placement (Borzunov et al., ACL 2023, appendix D) as Helix runs it: newcomers serve the worst-served layers.

Hosts arrive in a random order of fixed seed, and hold as many layers as fit, where the sorted throughputs of the layers
are lexicographically least. Spans overlap anyhow, so its flows rely on partial inference. Links are not looked at.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from kvmesh.planner.world import Problem, Span

SEED = 0


def place(problem: Problem, bound: float, seconds: float) -> Mapping[int, Span]:
    arrivals = [(table[-1], host) for host, table in enumerate(problem.throughput) if table]
    random.Random(SEED).shuffle(arrivals)
    served = [0.0] * problem.layers
    spans = {}
    for rate, host in arrivals:
        size = min(problem.max_layers(host), problem.layers)
        first = min(range(problem.layers - size + 1), key=lambda i: sorted(served[i : i + size]))
        spans[host] = (first, first + size)
        served[first : first + size] = [total + rate for total in served[first : first + size]]
    return spans
