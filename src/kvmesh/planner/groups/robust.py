"""Which of several plans to trust when speeds are known only roughly: the one whose largest regret is smallest.

The times of each kind of host are multiplied by errors drawn at random; routes adapt to what is true, groups and phases
stay. A plan's regret is how much less it serves than the best of the plans would, had that been known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random

from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.search import Candidate, Search
from kvmesh.planner.groups.worth import worth
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group

DRAWS = 8


@dataclass(frozen=True, slots=True)
class Regret:
    """Of each plan: the worst over all draws, as a share of the best plan of each draw."""

    worst: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def choice(self) -> int:
        return min(range(len(self.worst)), key=lambda plan: self.worst[plan])


def truths(task: Task, error: float, draws: int, seed: int) -> Iterator[Task]:
    """Tasks whose hosts are faster or slower, all of a kind alike: throughput times 1 - error to 1 + error."""
    random = Random(seed)
    kinds = sorted({(host.accelerator, host.accelerators) for host in task.hosts})
    for _ in range(draws):
        factors = {kind: 1 / random.uniform(1 - error, 1 + error) for kind in kinds}
        hosts = enumerate(task.hosts)
        yield replace(task, factors={i: factors[host.accelerator, host.accelerators] for i, host in hosts})


def regrets(
    task: Task,
    plans: Sequence[Sequence[Group]],
    error: float,
    draws: int = DRAWS,
    seed: int = 0,
    trust: Sequence[float] = (),
) -> Regret:
    """Routes of every plan as given, and under every draw. `trust` multiplies a plan's estimates: what a simulation
    left of them."""
    values, trusted = [], trust or [1.0] * len(plans)
    for truth in chain([task], truths(task, error, draws, seed)):
        estimator = Estimator(truth)
        routes = (estimator.route(groups, task.workload.rate) for groups in plans)
        values.append(tuple(t * route.value for t, route in zip(trusted, routes, strict=True)))
    best = [max(row) for row in values]
    worst = tuple(
        max(1 - row[plan] / top if top else 0.0 for row, top in zip(values, best, strict=True))
        for plan in range(len(plans))
    )
    return Regret(worst, tuple(values))


@dataclass(slots=True)
class Hedged(Search):
    """A search for the plan that serves most in the worst of several truths, each measured by the best known for it."""

    truths: Sequence[tuple[Estimator, float]] = ()

    def weigh(self, groups: tuple[Group, ...]) -> Candidate:
        routing, value = worth(self.estimator, groups)
        rate = self.estimator.task.workload.rate
        shares = [estimator.route(groups, rate).value / best for estimator, best in self.truths if best]
        return Candidate(groups, routing, (min(shares, default=0.0), value[0]))
