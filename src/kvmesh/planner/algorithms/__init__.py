"""The placement algorithms behind two calls that give the same Plan.

`place` puts layers on hosts for the most flow: an algorithm file maps a problem to spans. `arrange` forms groups of
accelerators with phases, for a workload and its SLOs: an algorithm file gives candidates. Neither kind knows of the
other files; bound, flow and time are added here, and every plan is checked by an independent evaluator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from kvmesh.errors import InvalidArgument
from kvmesh.planner.algorithms import (
    distserve_high,
    distserve_low,
    helix,
    helix_milp,
    kvmesh,
    petals,
    separate,
    splitwise,
    swarm,
    thunderserve,
)
from kvmesh.planner.bound import upper_bound
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.groups.outcome import settle
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.search import Candidate
from kvmesh.planner.task import Task
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
Arrangement = Callable[[Estimator, float, int], Sequence[Candidate]]
"""(estimator of a task, seconds, seed) -> candidates, the best last."""

ARRANGEMENTS: Mapping[str, Arrangement] = {
    "kvmesh": kvmesh.candidates,
    "thunderserve": thunderserve.candidates,
    "distserve-high": distserve_high.candidates,
    "distserve-low": distserve_low.candidates,
    "splitwise": splitwise.candidates,
}


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


def arrange(name: str, task: Task, time_limit: float = 10.0, seed: int = 0) -> tuple[Plan, Problem]:
    """A plan of groups, and the problem whose nodes it speaks of. Raises InvalidArgument where there is none."""
    if name not in ARRANGEMENTS:
        raise InvalidArgument(f"no algorithm {name!r}: there are {', '.join(ARRANGEMENTS)}")
    started = time.monotonic()
    estimator = Estimator(task)
    found = ARRANGEMENTS[name](estimator, time_limit, seed)
    seconds = time.monotonic() - started
    groups, routing = (found[-1].groups, found[-1].routing) if found else ((), None)
    return settle(name, estimator, groups, seconds, routing)
