"""DistServe's Algorithm 1 (OSDI 2024), for clusters whose network carries KV between any two hosts.

Prefill and decode instances get the shapes with the most goodput an accelerator, each for itself, by simulation and
binary search; as many of each as the rate needs or, without a rate, as balance each other on all accelerators. Since
those are few, the smallest shape and three others of each phase are simulated and combined: those that are best by an
estimate, which saves most simulations. The closest pairs are then simulated with both phases together. Unlike hosts are
planned kind by kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice, product
from math import inf, sqrt

from kvmesh.errors import InvalidArgument
from kvmesh.planner.groups.instances import Rack, Shape, fill, racks
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.search import Candidate, Search
from kvmesh.planner.groups.trial import simulated, simulated_phase
from kvmesh.planner.world import Group, Phase

MOST_SHAPES, TOLERANCE = 3, 0.03

FINALISTS, CLOSE = 4, 0.8
"""Pairs of shapes that are simulated together, if they are close to the best as judged phase by phase."""

Counted = tuple[tuple[float, int], tuple[Shape, int], tuple[Shape, int]]
"""(requests/s, minus accelerators), n prefill and m decode instances of their shapes."""
Joint = Callable[[list[Group], float], float]
"""(groups, estimate) -> requests/s within both SLOs."""
Judge = Callable[[Group, float], float]
"""(group, estimate) -> requests/s within the SLO of its phase."""


def candidates(estimator: Estimator, seconds: float, seed: int) -> list[Candidate]:
    """The one plan."""
    deadline = time.monotonic() + seconds

    @cache
    def judge(group: Group, estimate: float) -> float:
        late = time.monotonic() > deadline
        return estimate if late else simulated_phase(estimator, group, sqrt(estimator.task.slo.attainment), estimate)

    def joint(groups: list[Group], estimate: float) -> float:
        late = time.monotonic() > deadline
        return estimate if late else simulated(estimator, groups, start=estimate, tolerance=TOLERANCE)

    groups = [group for rack in racks(estimator.task) for group in place(estimator, rack, judge, joint)]
    search = Search(estimator, deadline, seed)
    search.offer(search.weigh(tuple(groups)))
    return search.tops


def place(estimator: Estimator, rack: Rack, judge: Judge, joint: Joint | None = None) -> list[Group]:
    """Instances on hosts of one kind: of all pairs of good shapes, that which serves most on them. With `joint`, it is
    chosen among the first few by judging both phases together."""
    if rack.accelerators < 2:
        return []
    prefill, decode = (good_shapes(estimator, rack, phase, judge) for phase in (Phase.PREFILL, Phase.DECODE))
    rate = estimator.task.workload.rate
    plans = [plan for pair in product(prefill.items(), decode.items()) for plan in _counts(rack, *pair, rate)]
    ranked = sorted(plans, reverse=True, key=lambda plan: plan[0])
    found = list(islice(_packed(estimator, rack, ranked), FINALISTS if joint else 1))
    if joint and len(found) > 1:
        return max(found, key=lambda one: joint(one[0], one[1]))[0]
    return found[0][0] if found else []


def _packed(estimator: Estimator, rack: Rack, plans: Sequence[Counted]) -> Iterator[tuple[list[Group], float]]:
    """Those that fit into the hosts, with their requests/s, as long as these are close to the first's."""
    best = 0.0
    for (rate, _), (p, n), (d, m) in plans:
        groups = fill(estimator.task, rack.hosts, [(p, Phase.PREFILL, n), (d, Phase.DECODE, m)])
        if len(groups) == n + m and rate >= CLOSE * best:
            best = best or rate
            yield groups, rate


def good_shapes(estimator: Estimator, rack: Rack, phase: Phase, judge: Judge) -> dict[Shape, float]:
    """Requests/s of an instance of each shape that may be the best for an accelerator."""
    estimates: dict[int, tuple[float, Shape, Group]] = {}
    # A partner of the other phase must find room beside it. Of each size, only the best shape by estimate.
    for shape in rack.shapes(max(1, rack.accelerators - 1)):
        group = Rack(estimator.task, rack.hosts).take(shape, phase)
        if group and estimator.timing(group).connected:
            one = estimator.rate(group), shape, group
            estimates[shape.size] = max(estimates.get(shape.size, one), one, key=lambda entry: entry[0])
    if not estimates:
        host = estimator.task.hosts[rack.hosts[0]]
        raise InvalidArgument(f"no shape of instance on hosts like {host.name} holds {estimator.task.model.name}")
    ranked = sorted(estimates.items(), key=lambda item: (-item[1][0] / item[0], item[0]))
    # The smallest fits where others do not.
    chosen = dict([*ranked[:MOST_SHAPES], min(estimates.items())])
    return {shape: judge(group, estimate) for estimate, shape, group in chosen.values()}


def _counts(rack: Rack, prefill: tuple[Shape, float], decode: tuple[Shape, float], rate: float | None) -> list[Counted]:
    """(requests/s, fewest accelerators), n and m: as the rate needs, else all that fill the accelerators."""
    (p, prompts), (d, tokens) = prefill, decode
    room = rack.accelerators
    if not prompts or not tokens:
        return []
    most = range(1, (room - d.size) // p.size + 1)
    pairs = [(n, m) for n in most for m in range(1, (room - n * p.size) // d.size + 1)]
    if rate is not None:
        pairs = [(n, m) for n, m in pairs if min(n * prompts, m * tokens) >= rate] or pairs
    served = [min(n * prompts, m * tokens, rate or inf) for n, m in pairs]
    return [((value, -n * p.size - m * d.size), (p, n), (d, m)) for value, (n, m) in zip(served, pairs, strict=True)]
