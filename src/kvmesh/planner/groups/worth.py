"""What a set of groups is worth under an objective: requests/s, or as few dollars or watts as serve what arrives.

Worths are compared as tuples. Power is the idle watts of every host in use plus, for the time that it computes, the
rest of its full watts; a host is paid for as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvmesh.planner.groups.routing import Estimator, Routing
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group

Worth = tuple[float, float]

SERVED = 1e-6


def worth(estimator: Estimator, groups: Sequence[Group]) -> tuple[Routing, Worth]:
    """The best routes among groups and what they are worth."""
    task = estimator.task
    if task.objective in ("flow", "goodput"):
        routing = estimator.route(groups)
        return routing, (routing.value, 0.0)
    routing = estimator.route(groups, task.workload.rate)
    routing = _lean(estimator, groups, routing)
    return routing, _economy(estimator, groups, routing)


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
    best = _economy(estimator, groups, routing)
    left_out: set[int] = set()
    for number in sorted(range(len(groups)), key=routing.through):
        trial = [group for i, group in enumerate(groups) if i not in left_out | {number}]
        numbers = dict(enumerate(i for i in range(len(groups)) if i not in left_out | {number}))
        found = renumbered(estimator.route(trial, estimator.task.workload.rate), numbers)
        value = _economy(estimator, groups, found)
        if found.rates and value >= best:
            routing, best = found, value
            left_out.add(number)
    return routing


def renumbered(routing: Routing, numbers: Mapping[int, int]) -> Routing:
    """With other numbers for the groups."""

    def pairs(values: Mapping[tuple[int, int], float]) -> dict[tuple[int, int], float]:
        return {(numbers[i], numbers[j]): value for (i, j), value in values.items()}

    return Routing(pairs(routing.rates), pairs(routing.attainments), routing.value)


def used_hosts(groups: Sequence[Group], routing: Routing) -> set[int]:
    return {shard.host for i, group in enumerate(groups) if routing.through(i) for shard in group.shards}


def dollars_per_hour(task: Task, groups: Sequence[Group], routing: Routing) -> float:
    return sum(task.hosts[host].dollars_per_hour for host in used_hosts(groups, routing))


def watts(estimator: Estimator, groups: Sequence[Group], routing: Routing) -> float:
    """Of the hosts in use, at these rates."""
    hosts = estimator.task.hosts
    total = sum(hosts[host].idle_watts for host in used_hosts(groups, routing))
    for i, group in enumerate(groups):
        busy = min(1.0, busy_share(estimator, groups, routing, i))
        for shard in group.shards:
            host = hosts[shard.host]
            total += busy * (host.watts - host.idle_watts) * len(shard.accelerators) / host.accelerators
    return total


def busy_share(estimator: Estimator, groups: Sequence[Group], routing: Routing, group: int) -> float:
    """Of the time in which a group could work within the SLOs."""
    return sum(rate * estimator.loads(groups, pair).get(group, 0.0) for pair, rate in routing.rates.items())
