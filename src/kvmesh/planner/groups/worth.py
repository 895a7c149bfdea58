"""What a set of groups is worth under an objective: requests/s, or as few dollars or watts as serve what arrives.

Worths are compared as tuples. Power is the idle watts of every host in use plus, for the time that it computes, the
rest of its full watts; a host is paid for as a whole. Under a power budget groups are left out as long as the others
serve more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from kvmesh.planner.groups.routing import Estimator, Routing
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group

Worth = tuple[float, float]
COUNTED = ("flow", "goodput")
"""Objectives that count requests/s."""

SERVED = 1e-6


def worth(estimator: Estimator, groups: Sequence[Group]) -> tuple[Routing, Worth]:
    """The best routes among groups and what they are worth."""
    task = estimator.task
    counted = task.objective in COUNTED
    routing = estimator.route(groups, None if counted else task.workload.rate)
    if not counted or task.power_budget < inf:
        routing = _lean(estimator, groups, routing)
    return routing, _value(estimator, groups, routing)


def _value(estimator: Estimator, groups: Sequence[Group], routing: Routing) -> Worth:
    if estimator.task.objective in COUNTED:
        return routing.value, 0.0
    return _economy(estimator, groups, routing)


def _economy(estimator: Estimator, groups: Sequence[Group], routing: Routing) -> Worth:
    """With a rate: serve as much of it, then as cheaply, as possible. Without: the most requests for the money."""
    task = estimator.task
    price = dollars_per_hour(task, groups, routing) if task.objective == "cost" else watts(estimator, groups, routing)
    if not price:
        return routing.value, 0.0
    if task.workload.rate is None:
        return routing.value / price, 0.0
    wanted = task.slo.attainment * task.workload.rate
    return min(1.0, routing.value / wanted + SERVED), -price


def _lean(estimator: Estimator, groups: Sequence[Group], routing: Routing) -> Routing:
    """Leaves out one group after the other, as long as that is worth more."""
    task = estimator.task
    rate = None if task.objective in COUNTED else task.workload.rate
    best = _value(estimator, groups, routing)
    left_out: set[int] = set()
    for number in sorted(range(len(groups)), key=lambda i: (routing.through(i), estimator.rate(groups[i]))):
        rest = [i for i in range(len(groups)) if i not in left_out | {number}]
        found = renumbered(estimator.route([groups[i] for i in rest], rate), dict(enumerate(rest)))
        value = _value(estimator, groups, found)
        if value >= best and (found.rates or not routing.rates):
            routing, best = found, value
            left_out.add(number)
    return routing


def renumbered(routing: Routing, numbers: Mapping[int, int]) -> Routing:
    """With other numbers for the groups."""

    def pairs(values: Mapping[tuple[int, int], float]) -> dict[tuple[int, int], float]:
        return {(numbers[i], numbers[j]): value for (i, j), value in values.items()}

    return Routing(pairs(routing.rates), pairs(routing.attainments), routing.value)


def used(groups: Sequence[Group], routing: Routing) -> tuple[tuple[Group, ...], Routing]:
    """The groups that serve, and their routes."""
    numbers = [number for number in range(len(groups)) if routing.through(number)]
    again = renumbered(routing, {old: new for new, old in enumerate(numbers)})
    return tuple(groups[number] for number in numbers), again


def used_hosts(groups: Sequence[Group], routing: Routing) -> set[int]:
    return {shard.host for i, group in enumerate(groups) if routing.through(i) for shard in group.shards}


def dollars_per_hour(task: Task, groups: Sequence[Group], routing: Routing) -> float:
    return sum(task.hosts[host].dollars_per_hour for host in used_hosts(groups, routing))


def watts(estimator: Estimator, groups: Sequence[Group], routing: Routing) -> float:
    """Of the hosts in use, at these rates."""
    hosts = estimator.task.hosts
    idle = sum(hosts[host].idle_watts for host in used_hosts(groups, routing))
    busy = (min(1.0, busy_share(estimator, groups, routing, i)) for i in range(len(groups)))
    return idle + sum(share * estimator.working_watts(group) for share, group in zip(busy, groups, strict=True))


def busy_share(estimator: Estimator, groups: Sequence[Group], routing: Routing, group: int) -> float:
    """Of the time in which a group could work within the SLOs."""
    return sum(rate * estimator.loads(groups, pair).get(group, 0.0) for pair, rate in routing.rates.items())
