"""Partitions of accelerators into groups with phases, where the search starts, and the moves from one to the next.

ThunderServe's moves: flip a group's phase, split a group, merge two, move accelerators from one to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from kvmesh.planner.groups.deduction import Pool
from kvmesh.planner.task import Task
from kvmesh.planner.world import Phase

Member = tuple[Pool, Phase]
Partition = frozenset[Member]

PHASES = tuple(Phase)


def fits(task: Task, pool: Pool) -> bool:
    """Whether the model's weights fit."""
    counts: dict[int, int] = {}
    for host, _ in pool:
        counts[host] = counts.get(host, 0) + 1
    return sum(task.max_layers(host, count) for host, count in counts.items()) >= task.model.layers


def whole_hosts(task: Task, hosts: Sequence[int]) -> Pool:
    return frozenset((host, number) for host in hosts for number in range(task.hosts[host].accelerators))


def clusters(task: Task) -> list[Pool]:
    """Hosts joined along the fastest links until each set holds the model (or nothing is left to join)."""
    pools = [whole_hosts(task, [host]) for host in range(len(task.hosts))]
    links = sorted((-link.bytes_per_s, edge) for edge, link in task.cluster.links.items() if 0 <= edge[0] < edge[1])
    for _, edge in links:
        small = [pool for pool in pools if not fits(task, pool)]
        sides = [next(pool for pool in pools if (end, 0) in pool) for end in edge]
        if sides[0] is not sides[1] and all(side in small for side in sides):
            pools = [pool for pool in pools if pool not in sides] + [sides[0] | sides[1]]
    return _gathered(task, pools)


def _gathered(task: Task, pools: list[Pool]) -> list[Pool]:
    """What does not hold the model alone joins the group with the fastest link to it."""
    whole = [pool for pool in pools if fits(task, pool)]
    for pool in pools:
        if pool not in whole and whole:
            nearest = max(whole, key=lambda other: _width(task, pool, other))
            whole[whole.index(nearest)] = nearest | pool
    return whole or [frozenset().union(*pools)]


def _width(task: Task, one: Pool, other: Pool) -> float:
    links = [task.link(u, v) for u, _ in one for v, _ in other]
    return max((link.bytes_per_s for link in links if link), default=0.0)


def alternating(pools: Sequence[Pool], prefill: int) -> Partition:
    """The first `prefill` pools prefill, the rest decode."""
    return frozenset((pool, Phase.PREFILL if i < prefill else Phase.DECODE) for i, pool in enumerate(pools))


def neighbours(task: Task, partition: Partition, random: Random) -> Iterator[Partition]:
    """Endless random moves that keep the model whole in every group."""
    members = sorted(partition, key=lambda member: (sorted(member[0]), member[1]))
    moves = (_flip, _flip, _split, _merge, _move, _move)
    while True:
        moved = random.choice(moves)(members, random)
        if moved and all(fits(task, pool) for pool, _ in moved):
            yield frozenset(moved)
        else:
            # No such move: flips are always possible, so this ends.
            yield frozenset(_flip(members, random))


def _flip(members: list[Member], random: Random) -> list[Member]:
    chosen = random.randrange(len(members))
    pool, phase = members[chosen]
    other = random.choice([new for new in PHASES if new is not phase])
    return [*members[:chosen], (pool, other), *members[chosen + 1 :]]


def _split(members: list[Member], random: Random) -> list[Member]:
    """At a random place in the order of hosts and accelerators, so that hosts stay whole where they can."""
    chosen = random.randrange(len(members))
    pool, phase = members[chosen]
    units = sorted(pool)
    if len(units) < 2:
        return []
    borders = [i for i in range(1, len(units)) if units[i - 1][0] != units[i][0]]
    cut = random.choice(borders) if borders and random.random() < 0.7 else random.randrange(1, len(units))
    halves = frozenset(units[:cut]), frozenset(units[cut:])
    phases = phase, random.choice(PHASES)
    return [*members[:chosen], *zip(halves, phases, strict=True), *members[chosen + 1 :]]


def _merge(members: list[Member], random: Random) -> list[Member]:
    if len(members) < 2:
        return []
    first, second = random.sample(range(len(members)), 2)
    rest = [member for i, member in enumerate(members) if i not in (first, second)]
    return [*rest, (members[first][0] | members[second][0], members[first][1])]


def _move(members: list[Member], random: Random) -> list[Member]:
    """A host's share of one group, or a single accelerator of it, joins another group."""
    if len(members) < 2:
        return []
    giver, taker = random.sample(range(len(members)), 2)
    pool, phase = members[giver]
    host = random.choice(sorted({host for host, _ in pool}))
    units = sorted(unit for unit in pool if unit[0] == host)
    moved = frozenset(units if random.random() < 0.7 else units[:1])
    if moved == pool:
        return []
    rest = [member for i, member in enumerate(members) if i not in (giver, taker)]
    return [*rest, (pool - moved, phase), (members[taker][0] | moved, members[taker][1])]
