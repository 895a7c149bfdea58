"""Splitwise's provisioning (ISCA 2024): every host is one machine; how many prefill, how many decode, how many do both.

Machines of one kind hold the whole model in the best tensor parallelism that their host allows. All pool sizes of all
kinds are searched, a few machines at a time where there are many; with a rate, fewer machines are tried as well by the
objective (cost or energy). Hosts that cannot hold the model alone stay idle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import product
from math import ceil

from kvmesh.errors import InvalidArgument
from kvmesh.planner.groups.deduction import Deducer
from kvmesh.planner.groups.instances import racks
from kvmesh.planner.groups.neighbours import fits, whole_hosts
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.search import Candidate, Search
from kvmesh.planner.world import Group, Phase

MOST = 4000
"""Pool sizes that are weighed."""

Pools = tuple[int, int, int]
"""Machines that prefill, decode, do both."""


def candidates(estimator: Estimator, seconds: float, seed: int) -> list[Candidate]:
    search = Search(estimator, time.monotonic() + seconds, seed)
    kinds = [
        [host for host in rack.hosts if fits(estimator.task, whole_hosts(estimator.task, [host]))]
        for rack in racks(estimator.task)
    ]
    kinds = [hosts for hosts in kinds if hosts]
    if not kinds:
        largest = max(estimator.task.hosts, key=lambda host: host.memory_bytes)
        raise InvalidArgument(
            f"splitwise keeps the model on single hosts, and even {largest.name} holds less than"
            f" {estimator.task.model.layers} layers of {estimator.task.model.name}"
        )
    for pools in _sizes(kinds):
        search.offer(search.weigh(_groups(search.deducer, kinds, pools)))
        if time.monotonic() > search.deadline:
            break
    return search.tops


def _sizes(kinds: Sequence[Sequence[int]]) -> Iterator[tuple[Pools, ...]]:
    """In steps that keep their number in bounds; the first is half and half."""
    step = 1
    while _count(kinds, step) > MOST:
        step += 1
    yield tuple((ceil(len(hosts) / 2), len(hosts) // 2, 0) for hosts in kinds)
    yield from product(*(list(_pools(len(hosts), step)) for hosts in kinds))


def _count(kinds: Sequence[Sequence[int]], step: int) -> int:
    total = 1
    for hosts in kinds:
        total *= sum(1 for _ in _pools(len(hosts), step))
    return total


def _pools(machines: int, step: int) -> Iterator[Pools]:
    for prefill in {*range(0, machines + 1, step), machines}:
        for decode in {*range(0, machines - prefill + 1, step), machines - prefill}:
            yield prefill, decode, machines - prefill - decode


def _groups(deducer: Deducer, kinds: Sequence[Sequence[int]], pools: Sequence[Pools]) -> tuple[Group, ...]:
    phases = (Phase.PREFILL, Phase.DECODE, Phase.MIXED)
    found = []
    for hosts, sizes in zip(kinds, pools, strict=True):
        parts = [phase for phase, size in zip(phases, sizes, strict=True) for _ in range(size)]
        pairs = zip(hosts, parts, strict=True)
        found += [deducer.group(whole_hosts(deducer.task, [host]), phase) for host, phase in pairs]
    return tuple(group for group in found if group)
