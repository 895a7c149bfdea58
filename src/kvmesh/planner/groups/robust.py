"""Which of several plans to trust when speeds are known only roughly: the one whose largest regret is smallest.

The times of each kind of host are multiplied by errors drawn at random. Groups and phases stay; routes adapt to what is
true (`regrets`) or keep their shares (`kept`), which `cautious` chooses with all truths in view. A plan's regret is how
much less it serves than the best of the plans would, had that been known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf
from random import Random

from kvmesh.planner.groups.routing import Estimator, Routing
from kvmesh.planner.groups.search import Candidate, Search
from kvmesh.planner.groups.worth import worth
from kvmesh.planner.solver import Program
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group

DRAWS = 8
NOTHING = 1e-9
EXPLORED, ROUNDS, EAGERNESS = 1e-3, 40, 0.5
"""Of a router that follows measured loads: the least share of a pair, how often it adapts, and how strongly."""


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
    return compared(values)


def compared(values: Sequence[Sequence[float]]) -> Regret:
    """What plans serve under each draw, one row a draw."""
    best = [max(row) for row in values]
    worst = tuple(
        max(1 - value / top if top else 0.0 for value, top in zip(column, best, strict=True))
        for column in zip(*values, strict=True)
    )
    return Regret(worst, tuple(map(tuple, values)))


def kept(estimator: Estimator, groups: Sequence[Group], routing: Routing) -> float:
    """Requests/s within the SLOs when every pair of groups keeps its share of the requests: as many in total as the
    group or link that is busiest then can bear."""
    pairs, total = estimator.pairs(groups), routing.total
    busy, served = [0.0] * len(groups), 0.0
    for pair, rate in routing.rates.items():
        link, chance = pairs.get(pair, (0.0, 0.0))
        served += rate / total * chance
        busy.append(rate / total / link if link else inf)
        for group, load in estimator.loads(groups, pair).items():
            busy[group] += rate / total * load
    return served / max(busy) if served else 0.0


def rebalanced(estimator: Estimator, groups: Sequence[Group], routing: Routing) -> Routing:
    """The same requests when a router moves shares, round by round, from pairs with a busy group or link to those with
    idle ones, as measured loads tell it: no speeds are believed and no program is solved. A pair is never given up for
    good, so one that could serve and had no share may get one."""
    pairs, total = estimator.pairs(groups), routing.total
    loads = {pair: load for pair in pairs if max((load := estimator.loads(groups, pair)).values()) < inf}
    share = {pair: routing.rates.get(pair, 0.0) / total + EXPLORED for pair in loads}
    for _ in range(ROUNDS if loads else 0):
        busy = [0.0] * len(groups)
        for pair, load in loads.items():
            for group, time in load.items():
                busy[group] += share[pair] * time
        pace = {pair: max(share[pair] / pairs[pair][0], *(busy[group] for group in loads[pair])) for pair in loads}
        mean = sum(share[pair] * pace[pair] for pair in pace) / sum(share.values())
        share = {pair: max(EXPLORED, each * (mean / pace[pair]) ** EAGERNESS) for pair, each in share.items()}
    return Routing(share, {pair: pairs[pair][1] for pair in share}, routing.value)


def cautious(estimators: Sequence[Estimator], groups: Sequence[Group]) -> Routing:
    """Shares that, kept, cost least in the worst of several truths, as a part of what other shares would serve there:
    a linear program. The first truth is the one believed. Rates are relative; without pairs that serve in all truths,
    there are none."""
    known = [(estimator, estimator.pairs(groups), estimator.route(groups).value) for estimator in estimators]
    able = [pair for pair in known[0][1] if all(pair in pairs for _, pairs, _ in known)]
    program = Program()
    whole = program.row(1.0, 1.0)
    busy = [[program.row(upper=0.0) for _ in groups] for _ in known]
    program.column(dict.fromkeys((row for rows in busy for row in rows), -1.0), cost=-1.0)
    columns = {}
    for pair in able:
        loads = [(rows, best, e.loads(groups, pair)) for rows, (e, _, best) in zip(busy, known, strict=True)]
        if all(max(load.values()) < inf for _, _, load in loads):
            entries = {rows[group]: best * time for rows, best, load in loads for group, time in load.items()}
            columns[pair] = program.column({whole: known[0][1][pair][1], **entries})
    solution = program.solve()
    rates = {pair: solution.values[column] for pair, column in columns.items()} if solution else {}
    rates = {pair: rate for pair, rate in rates.items() if rate > NOTHING}
    chances = {pair: known[0][1][pair][1] for pair in rates}
    return Routing(rates, chances, sum(rates[pair] * chances[pair] for pair in rates))


@dataclass(slots=True)
class Hedged(Search):
    """A search for the plan that serves most in the worst of several truths, each measured by the best known for it."""

    truths: Sequence[tuple[Estimator, float]] = ()

    def weigh(self, groups: tuple[Group, ...]) -> Candidate:
        routing, value = worth(self.estimator, groups)
        rate = self.estimator.task.workload.rate
        shares = [estimator.route(groups, rate).value / best for estimator, best in self.truths if best]
        return Candidate(groups, routing, (min(shares, default=0.0), value[0]))
