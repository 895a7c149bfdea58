"""Light rescheduling (ThunderServe): after drift or a lost host, only phases and routes change, and no weights move.

Groups that lost a host and still hold every layer go on; shards of others that hold what they lack lend them some of
their time, or they unite with a group that can use what is left; groups on standby are woken. One integer program
chooses all phases, for the groups and for their smallest parts; alike groups form pools; another parts all hosts
between the phases. From the best of these, phases are flipped, groups united, or hosts whose layers a group holds twice
go over to another, as long as that serves more, with the transportation program as the guide. Less than a second, where
planning anew takes many and moves weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, permutations, product, takewhile
from typing import Any

from kvmesh.planner.algorithms.thunderserve import arithmetic
from kvmesh.planner.groups.lending import lent, together
from kvmesh.planner.groups.outcome import goodput, node_names
from kvmesh.planner.groups.parts import assignments
from kvmesh.planner.groups.pools import parted, pooled
from kvmesh.planner.groups.routing import Estimator, Routing
from kvmesh.planner.groups.timing import cut
from kvmesh.planner.groups.worth import Worth, worth
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group, Phase, Shard

PAIRS_UP_TO = 12
"""Groups up to which two are flipped at once, united, or exchange hosts."""
MARGIN = 1e-3
LOANS_SHARE, START_SHARE = 0.4, 0.7
"""Of the time, at most until no more loans are weighed, and until moves are tried one by one."""
STANDBY = "standby"


@dataclass(frozen=True, slots=True)
class Flip:
    """A worker's change of part: the shards of one group change together. None before: it was on standby."""

    shard: Shard
    before: Phase | None
    after: Phase


@dataclass(frozen=True, slots=True)
class Replanned:
    """Groups and routes that go on; `before` is what the old phases would serve now, in the objective's unit."""

    groups: tuple[Group, ...]
    routing: Routing
    flips: tuple[Flip, ...]
    idle: tuple[Shard, ...]
    before: float
    value: float
    seconds: float


def replan(
    task: Task,
    groups: Sequence[Group],
    lost: Collection[int] = (),
    deadline: float = 0.8,
    clock: Callable[[], float] = time.monotonic,
    standby: Sequence[Group] = (),
) -> Replanned:
    """`task` as it is now; `groups` as they were planned, `standby` those that were sent nothing; `lost` hosts by
    number. Ends after `deadline` seconds of the clock with the best found so far."""
    started = clock()
    estimator = Estimator(task)
    planned = {shard: group.phase for group in groups for shard in group.shards}
    waiting = {shard for group in standby for shard in group.shards}
    untouched = tuple(group for group in groups if not any(shard.host in lost for shard in group.shards))
    before = measured(estimator, untouched)[1]
    left = survivors(estimator, (*groups, *standby), lost, lambda: clock() < started + LOANS_SHARE * deadline)
    alive = tuple(shard for shard in (*planned, *waiting) if shard.host not in lost)
    best, routing = _climb(
        estimator, _start(estimator, left, alive, started + START_SHARE * deadline, clock), started + deadline, clock
    )
    now = _parts(group for i, group in enumerate(best) if routing.through(i))
    flips = tuple(
        Flip(shard, planned.get(shard), phase) for shard, phase in now.items() if planned.get(shard) is not phase
    )
    idle = tuple(shard for shard in planned if shard not in now and shard.host not in lost)
    return Replanned(best, routing, flips, idle, before[0], measured(estimator, best)[1][0], clock() - started)


def _parts(groups: Iterable[Group]) -> dict[Shard, Phase]:
    """What every shard does; one that works for two groups does both."""
    parts: dict[Shard, Phase] = {}
    for shard, phase in ((_whole(shard), group.phase) for group in groups for shard in group.shards):
        parts[shard] = phase if parts.get(shard, phase) is phase else Phase.MIXED
    return parts


def _whole(shard: Shard) -> Shard:
    """With all of its time."""
    return replace(shard, time=1.0)


def measured(estimator: Estimator, groups: Sequence[Group]) -> tuple[Routing, Worth]:
    """The best routes and their worth; goodput as plans report it, at the loads that groups will see."""
    routing, value = worth(estimator, groups)
    seen = estimator.task.objective == "goodput"
    return routing, (goodput(estimator, groups, routing), 0.0) if seen else value


def _start(
    estimator: Estimator, left: tuple[Group, ...], alive: Sequence[Shard], deadline: float, clock: Callable[[], float]
) -> tuple[Group, ...]:
    """The best of: the groups as they are, pools of them or of their parts, and all shards parted anew."""
    sets = dict.fromkeys((left, parted(estimator.task, left)))
    pools = chain.from_iterable(pooled(estimator, groups, lambda: clock() < deadline) for groups in sets)
    again = (_kept_together(left, parts) for parts in assignments(estimator, alive, deadline, clock))
    best, value = left, measured(estimator, left)[1]
    for trial in chain(pools, again):
        best, value = max((best, value), (trial, measured(estimator, trial)[1]), key=lambda pair: pair[1])
        if clock() > deadline:
            break
    return best


def _kept_together(groups: Sequence[Group], parts: Sequence[Group]) -> tuple[Group, ...]:
    """The groups with new phases, if the new parts divide none of them; else the parts as two groups."""
    phases = {shard: part.phase for part in parts for shard in part.shards}
    if {shard for group in groups for shard in group.shards} != set(phases):
        return tuple(parts)
    kept = [{phases[shard] for shard in group.shards} for group in groups]
    if any(len(found) > 1 for found in kept):
        return tuple(parts)
    return tuple(replace(group, phase=found.pop()) for group, found in zip(groups, kept, strict=True))


def _climb(
    estimator: Estimator, groups: tuple[Group, ...], deadline: float, clock: Callable[[], float]
) -> tuple[tuple[Group, ...], Routing]:
    """The first move that serves more, again and again."""
    routing, value = measured(estimator, groups)
    improved = True
    while improved and clock() < deadline:
        improved = False
        more = chain(united(groups), shifted(estimator.task, groups)) if len(groups) <= PAIRS_UP_TO else ()
        for trial in chain(flipped(groups), more):
            found, gained = measured(estimator, trial)
            if gained > (value[0] * (1 + MARGIN), value[1]):
                groups, routing, value, improved = trial, found, gained, True
                break
            if clock() > deadline:
                break
    return groups, routing


def flipped(groups: Sequence[Group]) -> Iterator[tuple[Group, ...]]:
    """All that differ in the phase of one group, then of two."""
    for count in (1, 2) if len(groups) <= PAIRS_UP_TO else (1,):
        for chosen in combinations(range(len(groups)), count):
            others = [[phase for phase in Phase if phase is not groups[i].phase] for i in chosen]
            for phases in product(*others):
                changed = dict(zip(chosen, phases, strict=True))
                yield tuple(replace(group, phase=changed.get(i, group.phase)) for i, group in enumerate(groups))


def united(groups: Sequence[Group]) -> Iterator[tuple[Group, ...]]:
    """All in which two groups have become one: hosts that hold the same layers help each other."""
    for one, other in combinations(groups, 2):
        rest = tuple(group for group in groups if group not in (one, other))
        for phase in Phase:
            yield (*rest, Group(phase, together(one, other)))


def shifted(task: Task, groups: Sequence[Group]) -> Iterator[tuple[Group, ...]]:
    """All in which some hosts of one group, whose layers it holds twice, work for another: those that suit it best."""
    for giver, taker in permutations(groups, 2):
        rest = tuple(group for group in groups if group not in (giver, taker))
        sign = -1 if taker.phase is Phase.PREFILL else 1
        order = sorted(giver.shards, key=lambda shard: (sign * arithmetic(task, shard.host), shard))
        spare = list(_spare(task, giver, order))
        for count in sorted({len(spare) >> power for power in range(5)} - {0}):
            moved = tuple(spare[:count])
            stay = tuple(shard for shard in giver.shards if shard not in moved)
            yield (
                *rest,
                replace(giver, shards=stay),
                replace(taker, shards=together(taker, Group(taker.phase, moved))),
            )


def _spare(task: Task, group: Group, order: Sequence[Shard]) -> Iterator[Shard]:
    """Shards without which, together, the group still holds every layer."""
    depth = [sum(s.span[0] <= layer < s.span[1] for s in group.shards) for layer in range(task.model.layers)]
    for shard in order:
        if all(depth[layer] > 1 for layer in range(*shard.span)):
            for layer in range(*shard.span):
                depth[layer] -= 1
            yield shard


def survivors(
    estimator: Estimator, groups: Sequence[Group], lost: Collection[int], in_time: Callable[[], bool] = lambda: True
) -> tuple[Group, ...]:
    """Groups without the lost hosts. For one with a gap in its layers, shards of others that hold them lend some of
    their time, or it unites with a group that has them and computes them for both: whatever serves most."""
    layers = estimator.task.model.layers

    def value(trial: tuple[Group, ...]) -> Worth:
        return worth(estimator, trial)[1]

    rest = [replace(group, shards=tuple(s for s in group.shards if s.host not in lost)) for group in groups]
    whole = [group for group in rest if cut(group, layers)]
    for broken in (group for group in rest if group.shards and not cut(group, layers)):
        unions = [
            tuple(Group(phase, together(g, broken)) if g is group else g for g in whole)
            for group in whole
            for phase in dict.fromkeys((group.phase, Phase.MIXED))
        ]
        loans = takewhile(lambda trial: in_time(), lent(estimator, whole, broken))
        best = max(chain([tuple(whole)], unions, loans), key=value)
        whole = list(best)
    return tuple(whole)


def document(task: Task, found: Replanned) -> dict[str, Any]:
    """Decisions as the mesh applies them: each worker's change of part, and the weights of the routes among groups.
    `shares` names workers of a group that belong to another one, too, and how much of their time is this one's."""
    names = dict(zip(map(_whole, _shards(found)), node_names(task, found.groups), strict=True))
    total = found.routing.total or 1.0
    return {
        "decisions": [
            {"worker": names[flip.shard], "from": flip.before.value if flip.before else STANDBY, "to": flip.after.value}
            for flip in found.flips
        ],
        "groups": [
            {
                "phase": group.phase.value,
                "workers": [names[_whole(shard)] for shard in group.shards],
                "shares": {names[_whole(shard)]: shard.time for shard in group.shards if shard.time < 1},
            }
            for group in found.groups
        ],
        "routes": [
            {"prefill": i, "decode": j, "weight": rate / total, "requests_per_s": rate}
            for (i, j), rate in sorted(found.routing.rates.items())
        ],
        "idle": [task.hosts[shard.host].name for shard in found.idle],
        "value": found.value,
        "value_before": found.before,
        "seconds": found.seconds,
    }


def _shards(found: Replanned) -> list[Shard]:
    return [shard for group in found.groups for shard in group.shards]
