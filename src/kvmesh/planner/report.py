"""What people and programs read of a plan: one row a host, totals, and the JSON document. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmesh.planner.world import SINK, SOURCE, Plan, Problem, Span, Workload

ENDS = {SOURCE: "source", SINK: "sink"}
MIXED = "mixed"
"""Every host of these plans computes prompts and decodes alike."""


@dataclass(frozen=True, slots=True)
class Row:
    """A host that holds layers; rates in tokens/s."""

    host: str
    machine: str
    span: Span
    throughput: float
    flow: float

    @property
    def utilisation(self) -> float:
        return self.flow / self.throughput if self.throughput else 0.0


def rows(problem: Problem, plan: Plan) -> list[Row]:
    """In order of layers."""
    order = sorted(plan.placement, key=lambda host: (plan.placement[host], host))
    return [_row(problem, plan, host) for host in order]


def _row(problem: Problem, plan: Plan, host: int) -> Row:
    first, end = span = plan.placement[host]
    rate = problem.throughput[host][end - first - 1]
    return Row(problem.hosts[host], problem.machines[host], span, rate, plan.flow.through(host))


def kv_requests(problem: Problem, placement: Mapping[int, Span], workload: Workload) -> float:
    """How many mean requests have room for their KV at once: the least over all layers."""
    positions = [0.0] * problem.layers
    for host, (first, end) in placement.items():
        share = problem.kv_entries[host][end - first - 1] / (end - first)
        positions[first:end] = [total + share for total in positions[first:end]]
    return min(positions) / (workload.input_tokens + workload.output_tokens)


def document(problem: Problem, plan: Plan) -> dict[str, Any]:
    """The plan as JSON; rates in tokens/s, layers as [first, end)."""
    names = dict(enumerate(problem.hosts)) | ENDS
    hosts = sorted(plan.placement)
    return {
        "algorithm": plan.algorithm,
        "flow_tokens_per_s": plan.flow.value,
        "bound_tokens_per_s": plan.bound,
        "seconds": plan.seconds,
        "placement": {names[host]: list(plan.placement[host]) for host in hosts},
        "phase": {names[host]: MIXED for host in hosts},
        "links": [
            {
                "from": names[tail],
                "to": names[head],
                "flow_tokens_per_s": flow,
                "capacity_tokens_per_s": problem.capacity[tail, head],
            }
            for (tail, head), flow in sorted(plan.flow.edges.items())
        ],
    }
