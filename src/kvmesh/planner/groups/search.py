"""Tabu search over partitions into groups and phases (ThunderServe's upper level): the best neighbour that is not tabu.

Each neighbour is worth what the deduced groups and the best routes among them give. The incumbent is never lost, so the
search may stop at any time. Seeded: the same task gives the same plan, unless time runs out first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from random import Random

from kvmesh.planner.groups.deduction import Deducer
from kvmesh.planner.groups.neighbours import Partition, neighbours
from kvmesh.planner.groups.routing import Estimator, Routing
from kvmesh.planner.groups.worth import Worth, used, worth
from kvmesh.planner.world import Group

STEPS, NEIGHBOURS, MEMORY = 100, 10, 5
"""ThunderServe's: steps, neighbours of each, and how many partitions stay tabu."""
PATIENCE = 30
"""Steps without improvement after which it ends."""


@dataclass(frozen=True, slots=True)
class Candidate:
    groups: tuple[Group, ...]
    routing: Routing
    worth: Worth


@dataclass(slots=True)
class Search:
    """`tops` collects every candidate that improved on the best so far, best last."""

    estimator: Estimator
    deadline: float
    seed: int = 0
    tops: list[Candidate] = field(default_factory=list)
    deducer: Deducer = field(init=False)
    known: dict[Partition, Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deducer = Deducer(self.estimator)

    def candidate(self, partition: Partition) -> Candidate:
        """What a partition is worth; groups that cannot serve are left out."""
        if partition not in self.known:
            members = sorted(partition, key=lambda member: (sorted(member[0]), member[1]))
            found = (self.deducer.group(pool, phase) for pool, phase in members)
            self.known[partition] = self.weigh(tuple(group for group in found if group))
        return self.known[partition]

    def weigh(self, groups: tuple[Group, ...]) -> Candidate:
        routing, value = worth(self.estimator, groups)
        if self.estimator.task.power_budget < inf:
            groups, routing = used(groups, routing)
        return Candidate(groups, routing, value)

    def offer(self, candidate: Candidate) -> None:
        if candidate.routing.rates and (not self.tops or candidate.worth > self.tops[-1].worth):
            self.tops.append(candidate)

    def run(self, starts: Iterable[Partition], steps: int = STEPS) -> list[Candidate]:
        """From the best of the starts."""
        weighed = []
        for start in starts:
            weighed.append((self.candidate(start).worth, start))
            self.offer(self.candidate(start))
            if time.monotonic() > self.deadline:
                break
        self._walk(max(weighed, key=lambda pair: pair[0])[1], steps)
        return self.tops

    def _walk(self, partition: Partition, steps: int) -> None:
        random, tabu, idle = Random(self.seed), deque([partition], maxlen=MEMORY), 0
        for _ in range(steps):
            before = len(self.tops)
            step = self._step(partition, tabu, random)
            if step is None:
                return
            partition = step
            tabu.append(partition)
            idle = 0 if len(self.tops) > before else idle + 1
            if idle > PATIENCE:
                return

    def _step(self, partition: Partition, tabu: deque[Partition], random: Random) -> Partition | None:
        """The best of some neighbours; None when time is up."""
        around = dict.fromkeys(islice(neighbours(self.estimator.task, partition, random), NEIGHBOURS))
        best: tuple[Worth, Partition] | None = None
        for neighbour in around:
            if time.monotonic() > self.deadline:
                return None
            if neighbour in tabu:
                continue
            candidate = self.candidate(neighbour)
            self.offer(candidate)
            if best is None or candidate.worth > best[0]:
                best = candidate.worth, neighbour
        return best[1] if best else partition
