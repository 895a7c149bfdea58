"""DistServe's Algorithm 2 (OSDI 2024), for clusters where KV must stay inside a host.

Prefill and decode share the number of pipeline stages, and each host holds the same stage of both: so KV moves over the
host's own links. The pair of shapes with the most goodput an accelerator, by simulating both together, is repeated as
the rate needs; without a rate, the pair that gives most where it is repeated as often as it fits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from math import ceil

from kvmesh.planner.groups.instances import Rack, Shape, racks
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.search import Candidate, Search
from kvmesh.planner.groups.trial import simulated
from kvmesh.planner.world import Group, Phase

FAR_BELOW = 0.9
"""Estimates are mostly too high, by a tenth."""

Pair = tuple[Group, Group]


def candidates(estimator: Estimator, seconds: float, seed: int) -> list[Candidate]:
    """The one plan."""
    deadline = time.monotonic() + seconds
    groups = [group for rack in racks(estimator.task) for group in _place(estimator, rack, deadline)]
    search = Search(estimator, deadline, seed)
    search.offer(search.weigh(tuple(groups)))
    return search.tops


def _place(estimator: Estimator, rack: Rack, deadline: float) -> list[Group]:
    best: tuple[float, float, tuple[Shape, Shape]] | None = None
    estimates = []
    for shapes in _shapes(rack):
        if pair := _take(Rack(estimator.task, rack.hosts), shapes):
            total = estimator.route(pair).total
            estimates.append((total * _weight(estimator, rack, shapes), total, shapes, pair))
    for estimate, total, shapes, pair in sorted(estimates, key=lambda one: -one[0]):
        if best and estimate < FAR_BELOW * best[0]:
            break
        late = time.monotonic() > deadline
        goodput = total if late or not total else simulated(estimator, pair, start=total)
        value = goodput * _weight(estimator, rack, shapes)
        if best is None or value > best[0]:
            best = value, goodput, shapes
    return _repeat(estimator, rack, best[2], best[1]) if best and best[1] else []


def _weight(estimator: Estimator, rack: Rack, shapes: tuple[Shape, Shape]) -> float:
    """What a pair's goodput counts: by the accelerator for a given rate, else by how often it fits."""
    if estimator.task.workload.rate is not None:
        return 1 / sum(shape.size for shape in shapes)
    return len(_repeat(estimator, Rack(estimator.task, rack.hosts), shapes, 1.0)) / 2


def _shapes(rack: Rack) -> Iterator[tuple[Shape, Shape]]:
    """With equal stages, such that a stage of each fits into one host."""
    width = max(map(len, rack.free.values()))
    for prefill, decode in product(list(rack.shapes()), repeat=2):
        if prefill.stages == decode.stages <= len(rack.hosts) and prefill.tensor + decode.tensor <= width:
            yield prefill, decode


def _take(rack: Rack, shapes: tuple[Shape, Shape]) -> Pair | None:
    """Stage s of both on one host."""
    need = sum(shape.tensor for shape in shapes)
    hosts = [host for host in rack.hosts if len(rack.free[host]) >= need][: shapes[0].stages]
    if len(hosts) < shapes[0].stages:
        return None
    prefill, decode = rack.take(shapes[0], Phase.PREFILL, hosts), rack.take(shapes[1], Phase.DECODE, hosts)
    return (prefill, decode) if prefill and decode else None


def _repeat(estimator: Estimator, rack: Rack, shapes: tuple[Shape, Shape], goodput: float) -> list[Group]:
    """As often as the rate needs; without a rate, as fits."""
    rate, groups = estimator.task.workload.rate, list[Group]()
    copies = ceil(rate / goodput) if rate is not None else rack.accelerators
    for _ in range(copies):
        pair = _take(rack, shapes)
        if pair is None:
            break
        groups += pair
    return groups
