"""Reads a plan back from the JSON that `report.document` writes: what was asked for, and the groups that came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from kvmesh.errors import InvalidArgument
from kvmesh.planner.cluster_file import validated
from kvmesh.planner.world import Cluster, Group, Phase, Shard


class Part(BaseModel):
    """Of a larger document: other keys are somebody else's."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ShardPart(Part):
    host: str
    accelerators: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    layers: tuple[int, int]


class GroupPart(Part):
    phase: Phase
    shards: Annotated[list[ShardPart], Field(min_length=1)]


class RoutePart(Part):
    prefill: int
    decode: int
    share: float


class InputsPart(Part):
    """What `kvmesh plan` was asked: names or files, and numbers."""

    cluster: str
    model: str
    workload: str
    objective: str
    rate: float | None = None
    slo_ttft_seconds: float | None = None
    slo_tpot_seconds: float | None = None
    slo_attainment: float = 0.9
    kv_ratio: float = 1.0
    power_budget: float | None = None


class PlanPart(Part):
    algorithm: str
    inputs: InputsPart
    groups: Annotated[list[GroupPart], Field(min_length=1)]
    standby: list[GroupPart] = []
    routes: list[RoutePart] = []

    def placed(self, cluster: Cluster) -> tuple[Group, ...]:
        """Raises InvalidArgument for hosts that the cluster does not have."""
        return _placed(self.groups, cluster)

    def waiting(self, cluster: Cluster) -> tuple[Group, ...]:
        """The groups on standby. Raises as `placed`."""
        return _placed(self.standby, cluster)


def _placed(groups: Sequence[GroupPart], cluster: Cluster) -> tuple[Group, ...]:
    numbers = {host.name: number for number, host in enumerate(cluster.hosts)}
    unknown = sorted({shard.host for group in groups for shard in group.shards} - set(numbers))
    if unknown:
        raise InvalidArgument(f"the plan places layers on {unknown[0]}, which is no host of {cluster.name}")
    return tuple(
        Group(group.phase, tuple(Shard(numbers[s.host], tuple(s.accelerators), s.layers) for s in group.shards))
        for group in groups
    )


def read_plan(path: Path) -> PlanPart:
    """Raises InvalidArgument with every fault."""
    try:
        document: Any = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not JSON: {error}") from None
    return validated(PlanPart, document, str(path))
