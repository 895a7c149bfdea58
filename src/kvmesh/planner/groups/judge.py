"""The independent check of a plan of groups: memory, layers, links, routes, and its requests/s as a max flow.

Shares no code with the algorithms. Every shard is a node that serves as many requests/s as it could alone; a prompt
goes through the shards of a prefill group, its KV over the links, its tokens through the shards of a decode group. The
flow on that graph (`evaluator`) is more than any plan may promise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import inf
from statistics import fmean

from kvmesh.errors import InvalidArgument
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.task import Task
from kvmesh.planner.world import SINK, SOURCE, Edge, Flow, Group, Phase, Problem, Route, Shard, Span

SLACK = 1e-6
BATCHES = (*range(1, 16), *range(16, 64, 4), *range(64, 513, 32))


def check(task: Task, groups: Sequence[Group], routes: Sequence[Route], rate: float) -> Flow:
    """The max flow, requests/s, over nodes numbered as the shards of all groups in order. `rate` is what all routes are
    said to carry. Raises InvalidArgument with every fault."""
    found = [
        *_unfit(task, groups),
        *_overlapping(task, groups),
        *_apart(task, groups),
        *_misrouted(task, groups, routes),
    ]
    if found:
        raise InvalidArgument(violations=found)
    flow = node_flow(task, groups)
    loads = [*_loads(task, groups, routes, rate), *_overdrawn(task, groups, routes, rate)]
    if loads or rate > flow.value * (1 + SLACK):
        raise InvalidArgument(
            violations=loads or [("plan", f"promises {rate:.3f} requests/s; {flow.value:.3f} can flow")]
        )
    return flow


def _unfit(task: Task, groups: Sequence[Group]) -> Iterator[tuple[str, str]]:
    for number, group in enumerate(groups):
        held = [0] * task.model.layers
        for shard in group.shards:
            name = f"host {task.hosts[shard.host].name}"
            first, end = shard.span
            if not 0 <= first < end <= task.model.layers:
                yield name, f"holds layers [{first}, {end}) of {task.model.layers}"
                continue
            room = task.model.weights_share * task.memory(shard.host, len(shard.accelerators))
            if (end - first) * task.model.bytes_per_layer > room * (1 + SLACK):
                yield name, f"holds {end - first} layers in group {number}, more than its memory for weights"
            held[first:end] = [count + 1 for count in held[first:end]]
        if 0 in held:
            yield f"group {number}", f"does not hold layer {held.index(0)}"


def _overlapping(task: Task, groups: Sequence[Group]) -> Iterator[tuple[str, str]]:
    given: dict[tuple[int, int], float] = {}
    for shard in (shard for group in groups for shard in group.shards):
        for accelerator in shard.accelerators:
            given[shard.host, accelerator] = given.get((shard.host, accelerator), 0.0) + shard.time
    for (host, accelerator), time in given.items():
        if time > 1 + SLACK:
            name = f"host {task.hosts[host].name}"
            yield name, f"gives its shards {time:.0%} of the time of accelerator {accelerator}"
        if not 0 <= accelerator < task.hosts[host].accelerators:
            yield f"host {task.hosts[host].name}", f"has no accelerator {accelerator}"


def _apart(task: Task, groups: Sequence[Group]) -> Iterator[tuple[str, str]]:
    """Where a shard's layers end, some shard must go on (with layers of its own, or inside its span)."""
    for number, group in enumerate(groups):
        for shard in group.shards:
            end = shard.span[1]
            following = [other.host for other in group.shards if other.span[0] <= end < other.span[1]]
            ends = [SINK] if end == task.model.layers else following
            if not any(task.link(shard.host, host) for host in ends):
                yield f"host {task.hosts[shard.host].name}", f"has no link to the next layers of group {number}"


def _misrouted(task: Task, groups: Sequence[Group], routes: Sequence[Route]) -> Iterator[tuple[str, str]]:
    for i, j in ((route.prefill, route.decode) for route in routes):
        if not (_hands_over(groups[i], groups[j]) or (i == j and groups[i].phase is Phase.MIXED)):
            yield f"route {i} to {j}", f"joins a group for {groups[i].phase} with one for {groups[j].phase}"
    if abs(sum(route.share for route in routes) - 1) > SLACK:
        yield "routes", f"have shares that add up to {sum(route.share for route in routes):g}"


def _hands_over(out: Group, into: Group) -> bool:
    """A group that does both also decodes for others."""
    return out.phase is Phase.PREFILL and into.phase is not Phase.PREFILL


def _loads(task: Task, groups: Sequence[Group], routes: Sequence[Route], rate: float) -> Iterator[tuple[str, str]]:
    for route in routes:
        most = _kv_rate(task, groups[route.prefill], groups[route.decode])
        if route.prefill != route.decode and rate * route.share > most * (1 + SLACK):
            name = f"route {route.prefill} to {route.decode}"
            yield name, f"carries KV of {most:.3f} requests/s, not {rate * route.share:.3f}"
    for number, share in enumerate(_busy(task, groups, routes, rate)):
        if share > 1 + SLACK:
            yield f"group {number}", f"is sent {share:.1%} of the requests that it could serve"


def _busy(task: Task, groups: Sequence[Group], routes: Sequence[Route], rate: float) -> list[float]:
    """The share of each group's time that the routes take, at least."""
    busy = [0.0] * len(groups)
    for route in routes:
        for number, phase in ((route.prefill, Phase.PREFILL), (route.decode, Phase.DECODE)):
            busy[number] += rate * route.share / max(_group_rate(task, groups[number], phase), 1e-12)
    return busy


def _overdrawn(task: Task, groups: Sequence[Group], routes: Sequence[Route], rate: float) -> Iterator[tuple[str, str]]:
    """Hosts in use draw their idle watts, and the rest of their full ones while they compute."""
    drawn = sum(task.hosts[host].idle_watts for host in {shard.host for group in groups for shard in group.shards})
    for group, share in zip(groups, _busy(task, groups, routes, rate), strict=True):
        for shard in group.shards:
            host = task.hosts[shard.host]
            drawn += share * (host.watts - host.idle_watts) * len(shard.accelerators) / host.accelerators
    if drawn > task.power_budget * (1 + SLACK):
        yield "plan", f"draws {drawn:.0f} W at least; the power budget is {task.power_budget:g} W"


def _group_rate(task: Task, group: Group, phase: Phase) -> float:
    """Requests/s, at most: of the layers that fewest hosts hold, all of whose hosts do nothing else."""
    covering = ([s for s in group.shards if s.span[0] <= layer < s.span[1]] for layer in range(task.model.layers))
    return min(sum(shard_rate(task, phase, s) * s.layers for s in shards) for shards in covering)


def shard_rate(task: Task, phase: Phase, shard: Shard) -> float:
    """Requests/s of a shard alone."""
    latency, factor = task.latency(shard), task.factor(shard)
    prompt = factor * fmean(latency.prefill([tokens]) for tokens, _ in task.sample)
    most = min(task.kv_positions(shard) / task.context, float(BATCHES[-1]))
    batches = [batch for batch in BATCHES if batch <= most]
    steps = (factor * latency.decode(batch, round(batch * task.context)) / batch for batch in batches)
    tokens = min(steps, default=inf) * fmean(max(1, output) for _, output in task.sample)
    return 1 / {Phase.PREFILL: prompt, Phase.DECODE: tokens, Phase.MIXED: prompt + tokens}[phase]


def _kv_rate(task: Task, out: Group, into: Group) -> float:
    """Requests/s whose KV the links between two groups carry."""
    rates = [inf]
    for one, other in product(out.shards, into.shards):
        layers = min(one.span[1], other.span[1]) - max(one.span[0], other.span[0])
        if layers > 0:
            sharing = sum(s.span == one.span for s in out.shards) * sum(s.span == other.span for s in into.shards)
            link = task.link(one.host, other.host)
            size = task.model.kv_bytes * task.kv_ratio * layers * fmean(tokens for tokens, _ in task.sample)
            rates.append(link.bytes_per_s * sharing / size if link else 0.0)
    return min(rates)


def node_flow(task: Task, groups: Sequence[Group]) -> Flow:
    """Prompts flow through layers 0 to L, tokens through L to 2L: one chain for each request. A shard that does both is
    two nodes; that it cannot do both all the time is checked by loads."""
    nodes = [(g, phase, s) for g, group in enumerate(groups) for phase in _parts(group.phase) for s in group.shards]
    layers = task.model.layers
    # A host that computes a part of its layers is as much faster.
    rates = [shard_rate(task, phase, shard) * shard.layers for _, phase, shard in nodes]
    partial = _overlaps(groups)
    problem = Problem(
        hosts=tuple(f"{task.hosts[shard.host].name} in group {g}" for g, _, shard in nodes),
        machines=tuple(task.hosts[shard.host].machine for _, _, shard in nodes),
        layers=2 * layers,
        throughput=tuple(
            (rate if partial else rate / s.layers,) * 2 * layers for rate, (_, _, s) in zip(rates, nodes, strict=True)
        ),
        kv_entries=tuple((0,) * 2 * layers for _ in nodes),
        capacity=dict(_capacities(task, groups, nodes)),
    )
    return evaluate(problem, {i: _doubled(phase, s, layers) for i, (_, phase, s) in enumerate(nodes)}, partial)


def _parts(phase: Phase) -> tuple[Phase, ...]:
    return (Phase.PREFILL, Phase.DECODE) if phase is Phase.MIXED else (phase,)


def _overlaps(groups: Sequence[Group]) -> bool:
    """Whether some spans of a group overlap without being equal."""
    spans = (sorted(group.stages) for group in groups)
    return any(a[1] > b[0] for stages in spans for a, b in pairwise(stages))


def _doubled(phase: Phase, shard: Shard, layers: int) -> Span:
    first, end = shard.span
    return (first, end) if phase is Phase.PREFILL else (layers + first, layers + end)


def _capacities(
    task: Task, groups: Sequence[Group], nodes: Sequence[tuple[int, Phase, Shard]]
) -> Iterator[tuple[Edge, float]]:
    """Requests/s of every link that a request may take."""
    inputs, outputs = (fmean(column) for column in zip(*task.sample, strict=True))
    pairs = ((i, j) for i, out in enumerate(groups) for j, into in enumerate(groups) if _hands_over(out, into))
    kv_rates = {(i, j): _kv_rate(task, groups[i], groups[j]) for i, j in pairs}
    kv_rates |= {(i, i): inf for i, group in enumerate(groups) if group.phase is Phase.MIXED}
    for i, (number, phase, shard) in enumerate(nodes):
        work = inputs if phase is Phase.PREFILL else outputs
        edge = (SOURCE, i) if phase is Phase.PREFILL else (i, SINK)
        if link := task.link(*(shard.host if end == i else end for end in edge)):
            yield edge, link.bytes_per_s / (task.model.token_bytes * work)
        for j, (other, part, following) in enumerate(nodes):
            if i != j and other == number and part is phase and (link := task.link(shard.host, following.host)):
                yield (i, j), link.bytes_per_s / (task.model.activation_bytes * work)
            elif (phase, part) == (Phase.PREFILL, Phase.DECODE) and (number, other) in kv_rates:
                yield (i, j), kv_rates[number, other]
