"""Turns groups and their routes into a plan that has been checked: nodes, flow, bound, and what to expect.

The nodes of the plan are shards; a host that is not divided gives its name to its only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import inf, sqrt

import numpy as np

from kvmesh.errors import InvalidArgument
from kvmesh.planner.groups import judge, waiting
from kvmesh.planner.groups.ceiling import ceiling
from kvmesh.planner.groups.routing import Estimator, Routing
from kvmesh.planner.groups.worth import COUNTED, busy_share, dollars_per_hour, used, watts
from kvmesh.planner.task import Task
from kvmesh.planner.world import SINK, SOURCE, Edge, Expected, Flow, Group, Host, Phase, Plan, Problem, Route, Shard


def settle(
    algorithm: str, estimator: Estimator, groups: Sequence[Group], seconds: float, routing: Routing | None = None
) -> tuple[Plan, Problem]:
    """The plan, and the problem whose nodes it speaks of. Raises InvalidArgument if nothing can be served."""
    task = estimator.task
    routing = routing or estimator.route(groups, task.workload.rate)
    if not routing.rates:
        raise InvalidArgument(f"{algorithm} found no groups that serve any request within {_limits(task)}")
    kept, routing = used(groups, routing)
    routes = tuple(_chances(estimator, kept, routing))
    judge.check(task, kept, routes, routing.total)
    problem = nodes(task, kept)
    tokens = float(task.inputs.mean() + task.outputs.mean())
    plan = Plan(
        algorithm=algorithm,
        placement={i: shard.span for i, shard in enumerate(_shards(kept))},
        flow=Flow(routing.total * tokens, dict(_edges(estimator, kept, routing, tokens))),
        bound=ceiling(task) * tokens,
        seconds=seconds,
        groups=kept,
        routes=routes,
        expected=_expected(estimator, kept, routing, routes),
        standby=_standby(task, [group for group in groups if group not in kept]),
    )
    return plan, problem


def _standby(task: Task, unused: Sequence[Group]) -> tuple[Group, ...]:
    """Who counts hosts or watts leaves the rest off."""
    return tuple(unused) if task.objective in COUNTED and task.power_budget == inf else ()


def goodput(estimator: Estimator, groups: Sequence[Group], routing: Routing) -> float:
    """Requests/s within the SLOs at the loads that groups will see; the linear program counts every group as busy as it
    may be."""
    routes = _chances(estimator, groups, routing) if routing.rates else []
    return routing.total * sum(route.share * route.attainment for route in routes)


def _limits(task: Task) -> str:
    power = "" if task.power_budget == inf else f", under a power budget of {task.power_budget:g} W"
    return f"{task.slo.ttft:g} s to the first token and {task.slo.tpot:g} s a token{power}"


def _shards(groups: Sequence[Group]) -> list[Shard]:
    return [shard for group in groups for shard in group.shards]


def node_names(task: Task, groups: Sequence[Group]) -> list[str]:
    """A host's name, with its accelerators where a shard has only some of them."""
    return [_name(task.hosts[shard.host], shard) for shard in _shards(groups)]


def _name(host: Host, shard: Shard) -> str:
    whole = len(shard.accelerators) == host.accelerators
    return host.name if whole else f"{host.name}/{','.join(map(str, shard.accelerators))}"


def nodes(task: Task, groups: Sequence[Group]) -> Problem:
    """Shards as the nodes of a problem: what they would give, tokens/s, with any number of layers."""
    tokens = float(task.inputs.mean() + task.outputs.mean())
    members = [(group.phase, shard) for group in groups for shard in group.shards]
    tables = [_table(task, phase, shard, tokens) for phase, shard in members]
    shards = [shard for _, shard in members]
    return Problem(
        hosts=tuple(node_names(task, groups)),
        machines=tuple(task.speeds.machine(task.hosts[s.host].accelerator, len(s.accelerators)) for s in shards),
        layers=task.model.layers,
        throughput=tuple(tables),
        kv_entries=tuple(
            tuple(_entries(task, s, k + 1) for k in range(len(t))) for s, t in zip(shards, tables, strict=True)
        ),
        capacity={},
    )


def _table(task: Task, phase: Phase, shard: Shard, tokens: float) -> tuple[float, ...]:
    rate = judge.shard_rate(task, phase, shard) * tokens * shard.layers
    return tuple(rate / k for k in range(1, task.max_layers(shard.host, len(shard.accelerators)) + 1))


def _entries(task: Task, shard: Shard, layers: int) -> int:
    return int(layers * task.kv_positions(Shard(shard.host, shard.accelerators, (0, layers))))


def _chances(estimator: Estimator, groups: Sequence[Group], routing: Routing) -> list[Route]:
    """The routes, with the probability that their requests meet the SLO at the loads that groups will see."""
    total = routing.total
    return [Route(i, j, r / total, _chance(estimator, groups, routing, i, j)) for (i, j), r in routing.rates.items()]


def _chance(estimator: Estimator, groups: Sequence[Group], routing: Routing, i: int, j: int) -> float:
    prefill, decode = estimator.timing(groups[i]), estimator.timing(groups[j])
    shared = waiting.both(decode, _load(estimator, groups, routing, j)) if groups[j].phase is Phase.MIXED else None
    if i == j:
        return shared or 0.0
    first = waiting.first_tokens(prefill, routing.through(i))
    if shared is not None:
        return first * sqrt(shared)
    return first * waiting.next_tokens(decode, routing.through(j), estimator.transfer(groups[i], groups[j]))


def _load(estimator: Estimator, groups: Sequence[Group], routing: Routing, group: int) -> float:
    """Requests/s that keep the group as busy, if it served each of them as a whole."""
    return busy_share(estimator, groups, routing, group) * estimator.rate(groups[group])


def _edges(estimator: Estimator, groups: Sequence[Group], routing: Routing, tokens: float) -> list[tuple[Edge, float]]:
    """Tokens/s between nodes: from stage to stage by their shares of the work, then from group to group."""
    offsets = np.cumsum([0, *(len(group.shards) for group in groups)])
    edges: dict[Edge, float] = {}
    parts = [_parts(estimator, group, int(offset)) for group, offset in zip(groups, offsets, strict=False)]
    for (i, j), rate in routing.rates.items():
        chain = [*parts[i], *([] if i == j else parts[j])]
        for out, into in zip([{SOURCE: 1.0}, *chain], [*chain, {SINK: 1.0}], strict=True):
            for (u, part), (v, share) in product(out.items(), into.items()):
                if u != v:
                    edges[u, v] = edges.get((u, v), 0.0) + rate * tokens * part * share
    return list(edges.items())


def _parts(estimator: Estimator, group: Group, offset: int) -> list[dict[int, float]]:
    """Of each stage, the nodes and their shares of the work."""
    numbers = {shard: offset + i for i, shard in enumerate(group.shards)}
    return [{numbers[part.shard]: part.share for part in stage} for stage in estimator.timing(group).stages]


def _expected(estimator: Estimator, groups: Sequence[Group], routing: Routing, routes: Sequence[Route]) -> Expected:
    task, total = estimator.task, routing.total
    latencies = [_latencies(estimator, groups, routing, route) for route in routes]
    ttft, tpot = (sum(r.share * pair[k] for r, pair in zip(routes, latencies, strict=True)) for k in (0, 1))
    drawn = watts(estimator, groups, routing)
    return Expected(
        goodput=total * sum(route.share * route.attainment for route in routes),
        ttft=ttft,
        tpot=tpot,
        dollars_per_hour=dollars_per_hour(task, groups, routing),
        joules_per_token=drawn / (total * float(task.outputs.mean())),
        watts=drawn,
    )


def _latencies(estimator: Estimator, groups: Sequence[Group], routing: Routing, route: Route) -> tuple[float, float]:
    """Mean seconds to the first token, and between tokens."""
    means = [_means(estimator, groups, routing, number) for number in (route.prefill, route.decode)]
    if route.prefill == route.decode:
        return means[0]
    extra = estimator.transfer(groups[route.prefill], groups[route.decode])
    return means[0][0], means[1][1] + float((extra / estimator.task.outputs).mean())


def _means(estimator: Estimator, groups: Sequence[Group], routing: Routing, number: int) -> tuple[float, float]:
    """Of one group; what it does not do takes no time."""
    timing, rate = estimator.timing(groups[number]), routing.through(number)
    if groups[number].phase is Phase.MIXED:
        return waiting.means_of_both(timing, _load(estimator, groups, routing, number))
    if groups[number].phase is Phase.PREFILL:
        return waiting.mean_wait(timing.service, rate) + float(timing.first_token.mean()), 0.0
    return 0.0, timing.tpot(waiting.running(timing, rate))
