"""Alike groups as one: hosts that hold the same layers and play the same part share one queue, so fewer prompts wait.

No weights move when pools form or part, which is what lets a plan of pools follow the world. Knows neither what arrives
next nor how long its caller may take, but ends its own list when told.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

from kvmesh.planner.groups.lending import together
from kvmesh.planner.groups.phases import phased
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.timing import cut
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group, Phase, Span

SOLVER_SECONDS = 0.2


def pooled(estimator: Estimator, groups: Sequence[Group], in_time: Callable[[], bool]) -> Iterator[tuple[Group, ...]]:
    """The groups with their best phases, then pools: of one phase and kind of hosts, or of all that prefill."""

    def kind(group: Group) -> Hashable:
        return group.phase, frozenset(estimator.task.hosts[shard.host].machine for shard in group.shards)

    def phase(group: Group) -> Hashable:
        return group.phase if group.phase is Phase.PREFILL else group

    single = phased(estimator, groups, SOLVER_SECONDS)
    yield single
    routing = estimator.route(single)
    # Who can serve nothing alone may prefill together with others.
    all_in = [g if routing.through(i) else replace(g, phase=Phase.PREFILL) for i, g in enumerate(single)]
    gathered = united_by(phase, all_in)
    yield gathered
    for trial in (united_by(kind, all_in), united_by(kind, gathered)):
        if in_time():
            yield phased(estimator, trial, SOLVER_SECONDS)


def united_by(key: Callable[[Group], Hashable], groups: Sequence[Group]) -> tuple[Group, ...]:
    """Groups with the same key become one, in the phase of the first."""
    members: dict[Hashable, list[Group]] = {}
    for group in groups:
        members.setdefault(key(group), []).append(group)
    return tuple(Group(alike[0].phase, together(*alike)) for alike in members.values())


def parted(task: Task, groups: Sequence[Group]) -> tuple[Group, ...]:
    """As many groups as the weights allow: every shard that holds all layers alone, and what is left of each group; one
    whose rest would have a gap stays."""
    whole: Span = (0, task.model.layers)
    found: list[Group] = []
    for group in groups:
        rest = replace(group, shards=tuple(shard for shard in group.shards if shard.span != whole))
        if rest.shards and not cut(rest, task.model.layers):
            found.append(group)
        else:
            found += [replace(group, shards=(shard,)) for shard in group.shards if shard.span == whole]
            found += [rest] if rest.shards else []
    return tuple(found)
