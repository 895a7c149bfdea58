"""Who prefills and who decodes when layers stay where they are: a small integer program over hosts.

    max X    Σ_s u_se >= X and Σ_s v_se >= X for each run e of layers that the same shards hold
             Σ_e l_e c_s u_se <= z_s       Σ_e l_e d_s v_se <= 1 - z_s       z_s in {0, 1}

u and v are requests/s whose prompts and tokens shard s computes in run e, c and d its seconds a layer for them. The
more hosts hold each layer, the more there is to choose: `layout` makes such stages, at least two hosts wide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.timing import cut, layer_seconds
from kvmesh.planner.solver import Program
from kvmesh.planner.stages import Region, Stage, patterns
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group, Phase, Shard

ROUNDS, DAMPING = 6, 0.7
UNDER_WAY = 8
"""Batches in a pipeline at once, as long as it is not known."""
SOLVER_SECONDS = 0.15
STEP = 0.02
WIDTH = 2


def assignments(
    estimator: Estimator, shards: Sequence[Shard], deadline: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[Group, Group]]:
    """Shards parted into those that prefill and those that decode. SLOs leave less of one phase's capacity than of the
    other's: its seconds are counted higher in the next round."""
    bias, seen = 1.0, set[tuple[Group, Group]]()
    for _ in range(ROUNDS):
        chosen = assign(estimator.task, shards, bias)
        if chosen is None or chosen in seen:
            return
        seen.add(chosen)
        yield chosen
        prompts, tokens = (estimator.rate(group) for group in chosen)
        bias *= (prompts / tokens) ** DAMPING if prompts and tokens else 1.0
        if clock() > deadline:
            return


def assign(task: Task, shards: Sequence[Shard], bias: float = 1.0) -> tuple[Group, Group] | None:
    """None where the layers cannot be held by two disjoint sets of these shards."""
    runs = cut(Group(Phase.MIXED, tuple(shards)), task.model.layers)
    if not runs:
        return None
    program = Program()
    prefills = {s: (program.row(upper=0.0), program.row(upper=1.0)) for s in shards}
    served: dict[int, float] = {}
    costs = {
        s: (layer_seconds(task, Phase.PREFILL, s), bias * layer_seconds(task, Phase.DECODE, s, UNDER_WAY))
        for s in shards
    }
    for (first, end), holders in runs:
        prompt, token = program.row(lower=0.0), program.row(lower=0.0)
        served |= {prompt: -1.0, token: -1.0}
        for s in holders:
            busy, rest = prefills[s]
            program.column({prompt: 1.0, busy: (end - first) * costs[s][0]})
            program.column({token: 1.0, rest: (end - first) * costs[s][1]})
    program.column(served, cost=1.0)
    parts = {s: program.column({prefills[s][0]: -1.0, prefills[s][1]: 1.0}, limit=1.0, integer=True) for s in shards}
    solution = program.solve(SOLVER_SECONDS)
    if solution is None or solution.objective <= 0:
        return None
    prompts = tuple(s for s in shards if solution.values[parts[s]] > 0.5)
    tokens = tuple(s for s in shards if s not in prompts)
    return Group(Phase.PREFILL, prompts), Group(Phase.DECODE, tokens)


def layout(task: Task, seconds: float) -> tuple[Shard, ...]:
    """All hosts in stages of at least two, for the highest flow of whole requests; empty where there are too few."""
    deadline, kinds = time.monotonic() + seconds, _kinds(task)
    tables = tuple(_both(task, hosts[0]) for hosts in kinds)
    region = Region(tables, tuple(map(len, kinds)))
    high = sum(
        len(hosts) * max(t * k for k, t in enumerate(table, 1)) for hosts, table in zip(kinds, tables, strict=True)
    )
    low, high, best = 0.0, high / task.model.layers, list[Stage]()
    while high - low > STEP * high and time.monotonic() < deadline:
        middle = (low + high) / 2
        found = _stages(region, middle, task.model.layers, deadline - time.monotonic())
        low, high, best = (middle, high, found) if found else (low, middle, best)
    return _named(task, kinds, best, tables)


def _kinds(task: Task) -> list[list[int]]:
    kinds: dict[tuple[str, int, float], list[int]] = {}
    for number, host in enumerate(task.hosts):
        if task.max_layers(number, host.accelerators):
            key = host.accelerator, host.accelerators, task.factors.get(number, 1.0)
            kinds.setdefault(key, []).append(number)
    return list(kinds.values())


def _both(task: Task, host: int) -> tuple[float, ...]:
    """Whole requests/s with 1, 2, ... layers."""
    most = task.max_layers(host, task.hosts[host].accelerators)
    seconds = (k * layer_seconds(task, Phase.MIXED, _shard(task, host, 0, k), UNDER_WAY) for k in range(1, most + 1))
    return tuple(1 / each for each in seconds)


def _shard(task: Task, host: int, first: int, layers: int) -> Shard:
    return Shard(host, tuple(range(task.hosts[host].accelerators)), (first, first + layers))


def _stages(region: Region, flow: float, layers: int, seconds: float) -> list[Stage]:
    """Any stages that hold all layers and carry the flow."""
    program = Program()
    total = program.row(float(layers), float(layers))
    machines = [program.row(upper=float(count)) for count in region.counts]
    stages = list(patterns(region, flow, WIDTH))
    for stage in stages:
        used = {row: float(number) for row, number in zip(machines, stage.hosts, strict=True) if number}
        program.column({total: float(stage.layers), **used}, integer=True)
    solution = program.solve(seconds) if stages else None
    values = solution.values if solution else [0.0] * len(stages)
    return [stage for stage, value in zip(stages, values, strict=True) for _ in range(round(value))]


def _named(
    task: Task, kinds: Sequence[Sequence[int]], stages: Sequence[Stage], tables: Sequence[Sequence[float]]
) -> tuple[Shard, ...]:
    """Hosts for every stage; those left over join the weakest stage they fit."""
    free = [list(hosts) for hosts in kinds]
    shards, first, weakest = [], 0, []
    for stage in stages:
        hosts = [free[kind].pop() for kind, number in enumerate(stage.hosts) for _ in range(number)]
        rate = sum(number * tables[kind][stage.layers - 1] for kind, number in enumerate(stage.hosts) if number)
        shards += [_shard(task, host, first, stage.layers) for host in hosts]
        weakest.append([rate, first, stage.layers])
        first += stage.layers
    for kind, hosts in enumerate(free):
        for host in hosts:
            fitting = [entry for entry in weakest if entry[2] <= len(tables[kind])]
            if fitting:
                entry = min(fitting)
                entry[0] += tables[kind][int(entry[2]) - 1]
                shards.append(_shard(task, host, int(entry[1]), int(entry[2])))
    return tuple(sorted(shards, key=lambda shard: (shard.span, shard)))
