"""Max-flow placement on unlike hosts (Helix, ASPLOS 2025), solved by stages and regions, not by its own MILP.

1. For each order of regions, bisect on the flow F: is there a pipeline of stages that carries F (`stages`)?
2. Name the hosts and measure the true flow with all real links (`regions`, `settling`, `evaluator`); keep the best.
3. Where regions can hold the model without each other, try pipelines side by side as well.
4. Large clusters are dealt into several alike, each planned so.
5. If links do not bind and a gap to the bound is left, improve with the compact MILP over layer boundaries (`compact`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, permutations
from math import ceil
from statistics import median

from kvmesh.errors import InvalidArgument
from kvmesh.planner import compact
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.regions import Layout, crossing_links, divide, place_stages
from kvmesh.planner.stages import Region, pipeline
from kvmesh.planner.world import Problem, Span

STEP = 1e-5
"""Flows closer than this share are taken as equal."""
WORTH_POLISHING = 1e-3
POLISH_SECONDS = 2.0
PATIENCE = 0.25
"""A pipeline that is not found in this share of the time left is taken not to exist."""
FIRST_SECONDS = 2.0
DECK = 120
"""Hosts that are planned together."""
SPARE = 2
"""A deck holds the model at least so many times."""

Names = tuple[int, ...]
"""Regions by number."""


def place(problem: Problem, bound: float, seconds: float) -> Mapping[int, Span]:
    """The best placement found within `seconds`; stops early at a proven optimum."""
    deadline = time.monotonic() + seconds
    decks = list(_deal(problem, divide(problem, bound)))
    placement: dict[int, Span] = {}
    for left, deck in zip(range(len(decks), 0, -1), decks, strict=True):
        share = max(0.0, deadline - time.monotonic()) / left
        placement |= _place_deck(problem, deck, bound, time.monotonic() + share)
    if not placement:
        why = (
            f"in {seconds:.1f} s: raise the time limit"
            if time.monotonic() > deadline
            else "whose links join all layers"
        )
        raise InvalidArgument(f"helix found no pipeline {why}")
    return placement


def _deal(problem: Problem, layout: Layout) -> Iterator[Layout]:
    """Large clusters as several alike, each with pipelines of its own: patterns are too many otherwise."""
    room = sum(map(len, problem.throughput)) // problem.layers
    decks = max(1, min(ceil(len(problem.hosts) / DECK), room // SPARE))
    for deck in range(decks):
        yield layout.part(deck, decks)


def _place_deck(problem: Problem, layout: Layout, bound: float, deadline: float) -> Mapping[int, Span]:
    names = tuple(range(len(layout.regions)))
    best = _Search(problem, layout, bound, deadline).run(names)
    for placement in _side_by_side(problem, layout, bound, deadline):
        best.offer(placement)
    whole = sum(map(sum, (region.counts for region in layout.regions))) == len(problem.hosts)
    if whole and len(names) == 1 and best.placement and best.flow < bound * (1 - WORTH_POLISHING):
        left = min(POLISH_SECONDS, deadline - time.monotonic())
        best.offer(compact.polish(problem, best.placement, best.flow, bound, left))
    return best.placement


@dataclass(slots=True)
class _Best:
    problem: Problem
    placement: Mapping[int, Span] = field(default_factory=dict)
    flow: float = 0.0

    def offer(self, placement: Mapping[int, Span] | None) -> None:
        """Keeps the placement if its true flow is the best so far."""
        flow = evaluate(self.problem, placement).value if placement else 0.0
        if placement and flow > self.flow:
            self.placement, self.flow = placement, flow


def _side_by_side(problem: Problem, layout: Layout, bound: float, deadline: float) -> Iterator[Mapping[int, Span]]:
    """Unions of pipelines of disjoint sets of regions."""
    names = range(len(layout.regions))
    room = [_layers(region, 0.0) for region in layout.regions]
    parts: dict[Names, _Best] = {}
    for size in range(1, len(names)):
        for part in combinations(names, size):
            inside = sum(room[name] for name in part)
            if min(inside, sum(room) - inside) >= problem.layers:
                parts[part] = _Search(problem, layout, bound, deadline).run(part)
    for group in _disjoint(list(parts)):
        yield {host: span for part in group for host, span in parts[part].placement.items()}


def _disjoint(parts: Sequence[Names]) -> Iterator[list[Names]]:
    """All choices of two or more parts that share no region."""
    for i, first in enumerate(parts):
        rest = [part for part in parts[i + 1 :] if not set(part) & set(first)]
        yield from ([first, other] for other in rest)
        yield from ([first, *more] for more in _disjoint(rest))


class _Search:
    """The best single pipeline through some or all of a set of regions."""

    def __init__(self, problem: Problem, layout: Layout, bound: float, deadline: float) -> None:
        self.problem, self.layout, self.bound, self.deadline = problem, layout, bound, deadline
        self.best = _Best(problem)

    def run(self, names: Names) -> _Best:
        for order in self._orders(names):
            links = [crossing_links(self.problem, self.layout, a, b) for a, b in pairwise(order)]
            # A crossing's links depend on its hosts, chosen later: tried as the median link, then as the widest.
            for crossings in dict.fromkeys((tuple(map(median, links)), tuple(map(max, links)))):
                if all(crossings):
                    self._bisect(order, crossings)
                if time.monotonic() > self.deadline or self.best.flow >= self.bound * (1 - STEP):
                    return self.best
        return self.best

    def _orders(self, names: Names) -> Iterator[Names]:
        """Sequences of regions that could, links aside, still beat the best: fewest crossings first."""
        for size in range(1, len(names) + 1):
            for order in permutations(names, size):
                flow = self.best.flow * (1 + STEP)
                if sum(_layers(self.layout.regions[region], flow) for region in order) >= self.problem.layers:
                    yield order

    def _bisect(self, order: Names, crossings: tuple[float, ...]) -> None:
        low, high = self.best.flow * (1 + STEP), self.bound
        if not self._attempt(order, crossings, max(low, STEP * self.bound)):
            return
        while high - low > STEP * high and time.monotonic() < self.deadline:
            middle = (low + high) / 2
            found = self._attempt(order, crossings, middle)
            low, high = (middle, high) if found else (low, middle)

    def _attempt(self, order: Names, crossings: tuple[float, ...], flow: float) -> bool:
        """Whether stages for `flow` exist when each crossing's links carry so much."""
        regions = [self.layout.regions[region] for region in order]
        # However late it is, there has to be one plan.
        left = PATIENCE * (self.deadline - time.monotonic())
        left = left if self.best.placement else max(left, FIRST_SECONDS)
        stages = pipeline(regions, crossings, self.problem.layers, flow, left)
        if stages:
            self.best.offer(place_stages(self.problem, self.layout, order, stages, flow))
        return bool(stages)


def _layers(region: Region, flow: float) -> float:
    """What the region can hold at `flow`, at most; at flow 0, all that fits."""
    if not flow:
        return float(sum(n * len(table) for table, n in zip(region.tables, region.counts, strict=True)))
    shares = (max(k * min(t / flow, 1.0) for k, t in enumerate(table, 1)) for table in region.tables)
    return sum(n * share for n, share in zip(region.counts, shares, strict=True))
