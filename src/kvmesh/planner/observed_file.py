"""Reads what was observed since a plan was made: another load, other lengths, slower hosts, lost ones. YAML or JSON.

    {rate: 6.5, input_tokens: 1400, output_tokens: 30, lost: [old-3], speeds: {old-1: 0.6}}

Everything may be left out. Lengths are means: the workload's own requests are stretched to them. A speed is a host's
throughput as a share of what the plan took it for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from kvmesh.errors import InvalidArgument
from kvmesh.planner.cluster_file import Positive, Section, load_yaml, validated
from kvmesh.planner.task import Task
from kvmesh.planner.world import Cluster, Workload


class ObservedSection(Section):
    rate: Positive | None = None
    input_tokens: Positive | None = None
    output_tokens: Positive | None = None
    lost: tuple[str, ...] = ()
    speeds: dict[str, Positive] = Field(default_factory=dict)


def read_observed(path: Path) -> ObservedSection:
    return validated(ObservedSection, load_yaml(path), str(path))


def applied(task: Task, observed: ObservedSection) -> Task:
    """The task as it is now. Raises InvalidArgument for unknown hosts."""
    numbers = host_numbers(task.cluster, observed.speeds)
    factors = {number: 1 / speed for number, speed in zip(numbers, observed.speeds.values(), strict=True)}
    return replace(task, workload=_drifted(task.workload, observed), factors=factors)


def host_numbers(cluster: Cluster, names: Collection[str]) -> list[int]:
    known = {host.name: number for number, host in enumerate(cluster.hosts)}
    if unknown := [name for name in names if name not in known]:
        raise InvalidArgument(f"{', '.join(unknown)} is no host of {cluster.name}")
    return [known[name] for name in names]


def _drifted(workload: Workload, observed: ObservedSection) -> Workload:
    inputs, outputs = observed.input_tokens or workload.input_tokens, observed.output_tokens or workload.output_tokens
    longer, wordier = inputs / workload.input_tokens, outputs / workload.output_tokens
    lengths = tuple((max(1, round(i * longer)), max(1, round(o * wordier))) for i, o in workload.lengths)
    return replace(
        workload, input_tokens=inputs, output_tokens=outputs, lengths=lengths, rate=observed.rate or workload.rate
    )
