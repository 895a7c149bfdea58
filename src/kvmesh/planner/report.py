"""What people and programs read of a plan: one row a host, totals, and the JSON document. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvmesh.planner.world import SINK, SOURCE, Cluster, Group, Phase, Plan, Problem, Shard, Span, Workload

ENDS = {SOURCE: "source", SINK: "sink"}
MIXED = Phase.MIXED.value
"""What every host does in a plan without groups."""


@dataclass(frozen=True, slots=True)
class Row:
    """A host (or a part of one) that holds layers; rates in tokens/s."""

    host: str
    machine: str
    span: Span
    throughput: float
    flow: float
    phase: str = MIXED

    @property
    def utilisation(self) -> float:
        """At most 1: who only decodes for others counts their prompts in its flow, and does not compute them."""
        return min(1.0, self.flow / self.throughput) if self.throughput else 0.0


def headline(plan: Plan) -> str:
    return f"{plan.flow.value:.0f} tokens/s ({plan.algorithm}, bound {plan.bound:.0f})"


def rows(problem: Problem, plan: Plan) -> list[Row]:
    """In order of groups, and of layers in them."""
    numbers = [number for number, group in enumerate(plan.groups) for _ in group.shards]
    belongs = dict(enumerate(numbers)) if numbers else dict.fromkeys(plan.placement, 0)
    order = sorted(plan.placement, key=lambda host: (belongs[host], plan.placement[host], host))
    return [_row(problem, plan, host) for host in order]


def phases(plan: Plan) -> dict[int, str]:
    """Of every node."""
    if not plan.groups:
        return dict.fromkeys(plan.placement, MIXED)
    return dict(enumerate(group.phase.value for group in plan.groups for _ in group.shards))


def _row(problem: Problem, plan: Plan, host: int) -> Row:
    first, end = span = plan.placement[host]
    rate = problem.throughput[host][end - first - 1]
    flow = plan.flow.through(host)
    return Row(problem.hosts[host], problem.machines[host], span, rate, flow, phases(plan)[host])


def kv_requests(problem: Problem, placement: Mapping[int, Span], workload: Workload) -> float:
    """How many mean requests have room for their KV at once: the least over all layers."""
    positions = [0.0] * problem.layers
    for host, (first, end) in placement.items():
        share = problem.kv_entries[host][end - first - 1] / (end - first)
        positions[first:end] = [total + share for total in positions[first:end]]
    return min(positions) / (workload.input_tokens + workload.output_tokens)


def document(
    problem: Problem, plan: Plan, cluster: Cluster | None = None, inputs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The plan as JSON; rates in tokens/s (goodput in requests/s), layers as [first, end). With the cluster, groups are
    named; with the inputs, `kvmesh replan` can read it again."""
    names = dict(enumerate(problem.hosts)) | ENDS
    hosts = sorted(plan.placement)
    parts = phases(plan)
    return {
        "algorithm": plan.algorithm,
        "flow_tokens_per_s": plan.flow.value,
        "bound_tokens_per_s": plan.bound,
        "seconds": plan.seconds,
        "placement": {names[host]: list(plan.placement[host]) for host in hosts},
        "phase": {names[host]: parts[host] for host in hosts},
        "links": [
            {
                "from": names[tail],
                "to": names[head],
                "flow_tokens_per_s": flow,
                "capacity_tokens_per_s": problem.capacity.get((tail, head)),
            }
            for (tail, head), flow in sorted(plan.flow.edges.items())
        ],
        "gap": plan.gap,
        "groups": [_group(group, cluster) for group in _groups(plan, cluster)] if cluster else [],
        "standby": [_group(group, cluster) for group in plan.standby] if cluster else [],
        "routes": [asdict(route) for route in plan.routes],
        "expected": asdict(plan.expected) if plan.expected else None,
        "inputs": dict(inputs or {}),
    }


def _groups(plan: Plan, cluster: Cluster) -> Sequence[Group]:
    """Without groups of their own, all hosts are one."""
    if plan.groups:
        return plan.groups
    whole = (
        Shard(host, tuple(range(cluster.hosts[host].accelerators)), span)
        for host, span in sorted(plan.placement.items())
    )
    return [Group(Phase.MIXED, tuple(whole))]


def _group(group: Group, cluster: Cluster) -> dict[str, Any]:
    """`tensor` and `pipeline` parallelism are the widest and the number of stages."""
    shards = [
        {"host": cluster.hosts[s.host].name, "accelerators": list(s.accelerators), "layers": list(s.span)}
        for s in group.shards
    ]
    return {"phase": group.phase.value, "tensor": group.tensor, "pipeline": len(group.stages), "shards": shards}
