"""Groups with several hosts a stage: Helix's placement for one phase on some of the hosts.

Where hosts are small, a chain of single hosts wastes what does not fit together; stages of several unlike hosts do not.
T_i(k) is what a host serves of the phase with k layers, in requests/s, and links carry the activations of whole
requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from kvmesh.errors import InvalidArgument
from kvmesh.planner.algorithms import helix
from kvmesh.planner.bound import closed_form
from kvmesh.planner.groups.judge import shard_rate
from kvmesh.planner.task import Task
from kvmesh.planner.world import SINK, SOURCE, Edge, Group, Phase, Problem, Shard, Span


def network(task: Task, hosts: Sequence[int], phase: Phase, seconds: float) -> Group | None:
    """None where the hosts do not hold the model, or no pipeline of aligned stages was found in time."""
    problem = _problem(task, hosts, phase)
    if sum(map(len, problem.throughput)) < problem.layers or not (bound := closed_form(problem)):
        return None
    try:
        spans = helix.place(problem, bound, seconds)
    except InvalidArgument:
        return None
    shards = tuple(sorted((_shard(task, hosts[node], span) for node, span in spans.items()), key=lambda s: (s.span, s)))
    return Group(phase, shards) if aligned(shards, problem.layers) else None


def aligned(shards: Sequence[Shard], layers: int) -> bool:
    """Whether spans tile the layers."""
    spans = sorted({shard.span for shard in shards})
    tiled = all(a[1] == b[0] for a, b in pairwise(spans))
    return bool(spans) and tiled and spans[0][0] == 0 and spans[-1][1] == layers


def _shard(task: Task, host: int, span: Span) -> Shard:
    return Shard(host, tuple(range(task.hosts[host].accelerators)), span)


def _problem(task: Task, hosts: Sequence[int], phase: Phase) -> Problem:
    kinds = {_kind(task, host): host for host in hosts}
    rates = {kind: _table(task, host, phase) for kind, host in kinds.items()}
    tables = [rates[_kind(task, host)] for host in hosts]
    return Problem(
        hosts=tuple(task.hosts[host].name for host in hosts),
        machines=tuple(task.hosts[host].machine for host in hosts),
        layers=task.model.layers,
        throughput=tuple(tables),
        kv_entries=tuple((0,) * len(table) for table in tables),
        capacity=dict(_links(task, hosts, phase)),
    )


def _kind(task: Task, host: int) -> tuple[str, int, float]:
    return task.hosts[host].accelerator, task.hosts[host].accelerators, task.factors.get(host, 1.0)


def _table(task: Task, host: int, phase: Phase) -> tuple[float, ...]:
    most = task.max_layers(host, task.hosts[host].accelerators)
    return tuple(shard_rate(task, phase, _shard(task, host, (0, k))) for k in range(1, most + 1))


def _links(task: Task, hosts: Sequence[int], phase: Phase) -> Iterator[tuple[Edge, float]]:
    inputs, outputs = float(task.inputs.mean()), float(task.outputs.mean())
    tokens = {Phase.PREFILL: inputs, Phase.DECODE: outputs, Phase.MIXED: inputs + outputs}[phase]
    nodes = {host: node for node, host in enumerate(hosts)} | {SOURCE: SOURCE, SINK: SINK}
    for (tail, head), link in task.cluster.links.items():
        if tail in nodes and head in nodes:
            size = task.model.token_bytes if tail == SOURCE or head == SINK else task.model.activation_bytes
            yield (nodes[tail], nodes[head]), link.bytes_per_s / (size * tokens)
