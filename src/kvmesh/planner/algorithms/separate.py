"""One pipeline for each machine type (Helix's SP baseline); a type that cannot hold the model alone stays idle.

Within a pipeline each host is a stage of its own, and layers go to hosts so that the slowest of them is as fast as
possible. Half of the memory is for weights here as everywhere; Helix's own SP runs went beyond that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvmesh.errors import InvalidArgument
from kvmesh.planner.world import Problem, Span


def place(problem: Problem, bound: float, seconds: float) -> Mapping[int, Span]:
    spans: dict[int, Span] = {}
    room: dict[str, int] = {}
    for machine in dict.fromkeys(problem.machines):
        hosts = [host for host, own in enumerate(problem.machines) if own == machine]
        room[machine] = sum(map(problem.max_layers, hosts))
        spans |= _chain(problem, hosts)
    if not spans:
        held = ", ".join(f"{machine} {layers}" for machine, layers in room.items())
        raise InvalidArgument(f"separate: no machine type can hold all {problem.layers} layers alone ({held})")
    return spans


def _chain(problem: Problem, hosts: Sequence[int]) -> dict[int, Span]:
    """Consecutive spans on `hosts` with the highest slowest throughput; empty if the model does not fit."""
    rates = sorted({t for host in hosts for t in problem.throughput[host]}, reverse=True)
    for slowest in rates:
        sizes = [_most(problem.throughput[host], slowest) for host in hosts]
        if sum(sizes) >= problem.layers:
            return _lay(problem, hosts, sizes, slowest)
    return {}


def _most(table: Sequence[float], slowest: float) -> int:
    return max((k for k, t in enumerate(table, 1) if t >= slowest), default=0)


def _lay(problem: Problem, hosts: Sequence[int], sizes: list[int], slowest: float) -> dict[int, Span]:
    """Takes surplus layers away, one at a time from the slowest host that stays fast enough."""
    while sum(sizes) > problem.layers:
        able = [i for i, k in enumerate(sizes) if k == 1 or (k > 1 and problem.throughput[hosts[i]][k - 2] >= slowest)]
        if not able:
            break
        slow = min(able, key=lambda i: problem.throughput[hosts[i]][sizes[i] - 1])
        sizes[slow] -= 1
    spans, first = {}, 0
    for host, size in zip(hosts, sizes, strict=True):
        end = min(first + size, problem.layers)
        if end > first:
            spans[host] = (first, end)
        first = end
    return spans
