"""A gap in a group's layers, closed by shards of other groups that hold them too and lend a share of their time.

A lent shard works for two groups: it plays both parts. Nobody loads weights. Knows neither why there is a gap nor how
long its caller may look.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.timing import layer_seconds
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group, Phase, Shard

EXTRA = (0.0, 0.06, 0.15, 0.3, 0.5)
"""Shares of a lender's time, beyond what it does not need itself, that are tried."""
LEAST, LARGEST = 0.02, 0.9
MOST = 2
"""Lenders of one layer."""


def lent(estimator: Estimator, whole: Sequence[Group], broken: Group) -> Iterator[tuple[Group, ...]]:
    """`broken` with lenders that close its gaps, beside the groups they leave with less time: lenders of one group or
    of all, one or two for a layer, with more or less of their time. None where nobody holds the layers."""
    spare = {shard: left for group in whole for shard, left in _spare_time(estimator, group).items()}
    for chosen in dict.fromkeys(_choices(estimator.task, whole, broken, spare)):
        for extra, own in product(EXTRA, (True, False)):
            shares = {s: min(LARGEST, max(LEAST, own * spare[s]) + extra) for s in chosen}
            yield _shared(whole, broken, shares)


def _choices(
    task: Task, whole: Sequence[Group], broken: Group, spare: Mapping[Shard, float]
) -> Iterator[tuple[Shard, ...]]:
    """Shards that hold all missing layers together: those that could do most of each, in all or in their spare time."""
    layers = missing(broken, task.model.layers)
    for groups in (*([group] for group in whole), whole):
        shards = [shard for group in groups for shard in group.shards if shard.time == 1]
        for free in (spare, dict.fromkeys(spare, 1.0)):
            able = [_holders(task, shards, free, layer, broken.phase) for layer in layers]
            for count in range(1, 1 + MOST if all(able) else 1):
                yield tuple(sorted({shard for holders in able for shard in holders[:count]}))


def _shared(whole: Sequence[Group], broken: Group, shares: Mapping[Shard, float]) -> tuple[Group, ...]:
    """The groups when the broken one gets these shares of others' time."""
    given = tuple(replace(shard, time=share) for shard, share in shares.items())
    rest = (tuple(replace(s, time=s.time - shares.get(s, 0.0)) for s in group.shards) for group in whole)
    left = (replace(group, shards=shards) for group, shards in zip(whole, rest, strict=True))
    return (*left, replace(broken, shards=broken.shards + given))


def together(*groups: Group) -> tuple[Shard, ...]:
    """The shards of all; what two of them share is whole again."""
    times: dict[Shard, float] = {}
    for shard in (shard for group in groups for shard in group.shards):
        whole = replace(shard, time=1.0)
        times[whole] = times.get(whole, 0.0) + shard.time
    return tuple(replace(shard, time=time) for shard, time in times.items())


def missing(group: Group, layers: int) -> list[int]:
    """Layers that no shard holds."""
    return [layer for layer in range(layers) if not any(s.span[0] <= layer < s.span[1] for s in group.shards)]


def _spare_time(estimator: Estimator, group: Group) -> dict[Shard, float]:
    """The share of each shard's time in which it waits for the busiest one of its group."""
    busy: dict[Shard, float] = {}
    for part in (part for stage in estimator.timing(group).stages for part in stage):
        seconds = part.share * part.layers * layer_seconds(estimator.task, group.phase, part.shard)
        busy[part.shard] = busy.get(part.shard, 0.0) + seconds
    return {shard: 1 - busy.get(shard, 0.0) / max(busy.values()) for shard in group.shards}


def _holders(task: Task, shards: Iterable[Shard], free: Mapping[Shard, float], layer: int, phase: Phase) -> list[Shard]:
    """Of a layer, first those that serve most in their free time."""
    able = [shard for shard in shards if shard.span[0] <= layer < shard.span[1]]
    return sorted(able, key=lambda shard: -max(LEAST, free[shard]) / layer_seconds(task, phase, shard))
