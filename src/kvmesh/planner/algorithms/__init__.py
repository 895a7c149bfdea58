"""The placement algorithms behind one call: `place(name, problem, time_limit) -> Plan`.

Each algorithm file maps a problem to spans and knows nothing of the others; bound, flow and time are added here, by the
independent evaluator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from kvmesh.errors import InvalidArgument
from kvmesh.planner.algorithms import helix, helix_milp, petals, separate, swarm
from kvmesh.planner.bound import upper_bound
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.world import Plan, Problem, Span

Algorithm = Callable[[Problem, float, float], Mapping[int, Span]]
"""(problem, proven bound, seconds left) -> spans by host."""

ALGORITHMS: Mapping[str, Algorithm] = {
    "helix": helix.place,
    "helix-milp": helix_milp.place,
    "swarm": swarm.place,
    "petals": petals.place,
    "separate": separate.place,
}
PARTIAL = frozenset({"petals"})
"""Algorithms whose spans overlap, so that a host may compute only the rest of its layers for a request."""
OBJECTIVES = ("flow",)


def place(name: str, problem: Problem, time_limit: float = 10.0) -> Plan:
    """Raises InvalidArgument for an unknown algorithm, and when it has no placement for this cluster."""
    if name not in ALGORITHMS:
        raise InvalidArgument(f"no algorithm {name!r}: there are {', '.join(ALGORITHMS)}")
    room = sum(map(len, problem.throughput))
    if room < problem.layers:
        raise InvalidArgument(f"the hosts have room for {room} of {problem.layers} layers")
    started = time.monotonic()
    bound = upper_bound(problem)
    if not bound:
        raise InvalidArgument("no tokens can flow between the coordinator and the hosts")
    spans = ALGORITHMS[name](problem, bound, time_limit - (time.monotonic() - started))
    seconds = time.monotonic() - started
    return Plan(name, dict(spans), evaluate(problem, spans, partial=name in PARTIAL), bound, seconds)
