"""Copies of one shape, tensor times pipeline parallelism, packed into equal hosts: what DistServe and Splitwise place.

A stage's accelerators are of one host; stages of an instance lie on as few hosts as possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvmesh.planner.groups.deduction import balanced
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group, Phase, Shard


@dataclass(frozen=True, slots=True)
class Shape:
    """Of an instance: `tensor` accelerators in each of `stages` stages."""

    tensor: int
    stages: int

    @property
    def size(self) -> int:
        return self.tensor * self.stages

    def __str__(self) -> str:
        return f"{self.tensor}x{self.stages}"


@dataclass(slots=True)
class Rack:
    """Equal hosts and which of their accelerators are free."""

    task: Task
    hosts: Sequence[int]
    free: dict[int, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.free = {host: list(range(self.task.hosts[host].accelerators)) for host in self.hosts}

    @property
    def accelerators(self) -> int:
        return sum(map(len, self.free.values()))

    def shapes(self, most: int | None = None) -> Iterator[Shape]:
        """All that hold the model, of at most `most` accelerators."""
        width = max(map(len, self.free.values()))
        for tensor in self.task.speeds.sizes(self.task.hosts[self.hosts[0]].accelerator, width):
            # Stages that straddle hosts need whole pieces of each.
            fitting = sum(len(free) // tensor for free in self.free.values())
            for stages in range(1, min(fitting, (most or self.accelerators) // tensor) + 1):
                room = self.task.max_layers(self.hosts[0], tensor) * stages
                if room >= self.task.model.layers >= stages:
                    yield Shape(tensor, stages)

    def take(self, shape: Shape, phase: Phase, aligned: Sequence[int] | None = None) -> Group | None:
        """One instance, or None where it does not fit. `aligned`: the host of each stage."""
        chosen: list[int] = []
        for stage in range(shape.stages):
            candidates = [aligned[stage]] if aligned else self._preferred(chosen[-1] if chosen else None)
            host = next((h for h in candidates if len(self.free[h]) >= shape.tensor), None)
            if host is None:
                self._give_back(chosen, shape)
                return None
            chosen.append(host)
            self.free[host] = self.free[host][shape.tensor :]
        return self._group(chosen, shape, phase)

    def _preferred(self, last: int | None) -> list[int]:
        """The host of the last stage, then the fullest."""
        return sorted(self.hosts, key=lambda host: (host != last, len(self.free[host]), host))

    def _give_back(self, chosen: Sequence[int], shape: Shape) -> None:
        for host in chosen:
            self.free[host] = list(range(self._end(host) - shape.tensor, self._end(host))) + self.free[host]

    def _end(self, host: int) -> int:
        return self.free[host][0] if self.free[host] else self.task.hosts[host].accelerators

    def _group(self, chosen: Sequence[int], shape: Shape, phase: Phase) -> Group:
        seconds = [self.task.factors.get(host, 1.0) for host in chosen]
        limits = [self.task.max_layers(host, shape.tensor) for host in chosen]
        shards, first = [], 0
        used = dict.fromkeys(chosen, 0)
        for host in reversed(chosen):
            used[host] += 1
        for host, layers in zip(chosen, balanced(seconds, limits, self.task.model.layers), strict=True):
            start = self._end(host) - used[host] * shape.tensor
            used[host] -= 1
            shards.append(Shard(host, tuple(range(start, start + shape.tensor)), (first, first + layers)))
            first += layers
        return Group(phase, tuple(shards))


def racks(task: Task) -> list[Rack]:
    """Hosts of equal accelerators, as many in each host."""
    kinds: dict[tuple[str, int], list[int]] = {}
    for number, host in enumerate(task.hosts):
        kinds.setdefault((host.accelerator, host.accelerators), []).append(number)
    return [Rack(task, hosts) for hosts in kinds.values()]


def fill(task: Task, hosts: Sequence[int], wanted: Sequence[tuple[Shape, Phase, int]]) -> list[Group]:
    """So many instances of each shape, the largest first; fewer where they do not fit."""
    rack, groups = Rack(task, hosts), []
    for shape, phase, count in sorted(wanted, key=lambda one: -one[0].tensor):
        taken = (rack.take(shape, phase) for _ in range(count))
        groups += [group for group in taken if group]
    return groups
