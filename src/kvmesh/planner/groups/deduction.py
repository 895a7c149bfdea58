"""The best tensor and pipeline parallelism for a set of accelerators that shall compute one phase (ThunderServe).

Tensor parallelism stays inside a host. Hosts come in the order whose slowest link is fastest, by dynamic programming;
layers go to stages so that the slowest of them is as fast as possible, within memory. A stage may stay empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.timing import TYPICAL_BATCH
from kvmesh.planner.task import Task
from kvmesh.planner.world import Group, Phase, Shard

EXACT = 7
"""Hosts of a group up to which all orders are considered."""

Pool = frozenset[tuple[int, int]]
"""(host, accelerator) pairs."""


class Deducer:
    """The best group of each pool and phase, each deduced once."""

    def __init__(self, estimator: Estimator) -> None:
        self.estimator, self.task = estimator, estimator.task
        self.group = lru_cache(maxsize=20_000)(self._group)
        self.order = lru_cache(maxsize=20_000)(self._order)

    def _group(self, pool: Pool, phase: Phase) -> Group | None:
        """None where the model does not fit, or the links do not join it."""
        groups = [
            Group(phase, shards)
            for pieces in _pieces(self.task, pool)
            for shards in self._layouts(pieces, phase)
            if shards
        ]
        best = max(groups, key=self.estimator.rate, default=None)
        return best if best and self.estimator.timing(best).connected else None

    def _layouts(self, pieces: Mapping[int, Sequence[tuple[int, ...]]], phase: Phase) -> Iterator[tuple[Shard, ...]]:
        ordered = [(host, piece) for host in self.order(frozenset(pieces)) for piece in pieces[host]]
        limits = [self.task.max_layers(host, len(piece)) for host, piece in ordered]
        yield _shards(ordered, self._fast(ordered, limits, phase))
        if phase is not Phase.PREFILL:
            # Decoding may want room for KV more than speed.
            yield _shards(
                ordered, balanced([1 / self.task.memory(h, len(p)) for h, p in ordered], limits, self._layers)
            )

    def _fast(self, ordered: Sequence[tuple[int, tuple[int, ...]]], limits: Sequence[int], phase: Phase) -> list[int]:
        return balanced([self._layer_seconds(host, piece, phase) for host, piece in ordered], limits, self._layers)

    @property
    def _layers(self) -> int:
        return self.task.model.layers

    def _layer_seconds(self, host: int, piece: tuple[int, ...], phase: Phase) -> float:
        shard = Shard(host, piece, (0, 1))
        latency, factor = self.task.latency(shard), self.task.factor(shard)
        prompt = latency.prefill([round(self.task.workload.input_tokens)])
        step = latency.decode(TYPICAL_BATCH, round(TYPICAL_BATCH * self.task.context))
        weights = {Phase.PREFILL: (1.0, 0.0), Phase.DECODE: (0.0, 1.0)}
        both = (1.0, self.task.workload.output_tokens / TYPICAL_BATCH)
        prefill, decode = weights.get(phase, both)
        return factor * (prefill * prompt + decode * step)

    def _order(self, hosts: frozenset[int]) -> tuple[int, ...]:
        names = sorted(hosts)
        widths = {(u, v): self._width(u, v) for u in names for v in names if u != v}
        if len(set(widths.values())) <= 1:
            return tuple(names)
        return _widest_path(names, widths) if len(names) <= EXACT else _nearest(names, widths)

    def _width(self, tail: int, head: int) -> float:
        link = self.task.link(tail, head)
        return link.bytes_per_s if link else 0.0


def balanced(seconds: Sequence[float], limits: Sequence[int], layers: int) -> list[int]:
    """Layers for each stage, at most its limit, with the slowest as fast as possible; empty if they do not fit."""
    if sum(limits) < layers:
        return []
    counts = [0] * len(seconds)
    heap = [(cost, i) for i, cost in enumerate(seconds) if limits[i] > 0]
    heapify(heap)
    for _ in range(layers):
        _, i = heappop(heap)
        counts[i] += 1
        if counts[i] < limits[i]:
            heappush(heap, ((counts[i] + 1) * seconds[i], i))
    return counts


def _shards(ordered: Sequence[tuple[int, tuple[int, ...]]], counts: Sequence[int]) -> tuple[Shard, ...]:
    shards, first = [], 0
    for (host, piece), count in zip(ordered, counts, strict=False):
        if count:
            shards.append(Shard(host, piece, (first, first + count)))
        first += count
    return tuple(shards)


def _pieces(task: Task, pool: Pool) -> Iterator[dict[int, list[tuple[int, ...]]]]:
    """The accelerators of each host in pieces of at most 1, 2, 4, ..."""
    hosts: dict[int, list[int]] = {}
    for host, accelerator in sorted(pool):
        hosts.setdefault(host, []).append(accelerator)
    seen = []
    for most in (1 << power for power in range(max(map(len, hosts.values())).bit_length())):
        pieces = {host: _chunks(task, host, own, most) for host, own in hosts.items()}
        if pieces not in seen:
            seen.append(pieces)
            yield pieces


def _chunks(task: Task, host: int, accelerators: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """The largest pieces first; what no tensor parallelism uses is left over."""
    pieces, rest = [], list(accelerators)
    for size in reversed(task.speeds.sizes(task.hosts[host].accelerator, most)):
        while len(rest) >= size:
            pieces.append(tuple(rest[:size]))
            rest = rest[size:]
    return pieces


def _widest_path(hosts: Sequence[int], widths: Mapping[tuple[int, int], float]) -> tuple[int, ...]:
    """Through all hosts, the slowest link as fast as possible: Held and Karp's program over (visited, last)."""
    best: dict[tuple[frozenset[int], int], tuple[float, tuple[int, ...]]] = {
        (frozenset([host]), host): (float("inf"), (host,)) for host in hosts
    }
    for _ in hosts[1:]:
        longer: dict[tuple[frozenset[int], int], tuple[float, tuple[int, ...]]] = {}
        for (visited, last), (width, path) in best.items():
            for host in hosts:
                if host not in visited:
                    key = visited | {host}, host
                    found = min(width, widths[last, host]), (*path, host)
                    if key not in longer or found[0] > longer[key][0]:
                        longer[key] = found
        best = longer
    return max(best.values(), key=lambda found: found[0])[1]


def _nearest(hosts: Sequence[int], widths: Mapping[tuple[int, int], float]) -> tuple[int, ...]:
    """Always on to the host with the widest link; the best over all starts."""

    def walk(start: int) -> tuple[float, tuple[int, ...]]:
        path, left, width = [start], set(hosts) - {start}, float("inf")
        while left:
            last = path[-1]
            following = max(sorted(left), key=lambda host: widths[last, host])
            width = min(width, widths[last, following])
            path.append(following)
            left.remove(following)
        return width, tuple(path)

    return max((walk(start) for start in hosts), key=lambda found: found[0])[1]
