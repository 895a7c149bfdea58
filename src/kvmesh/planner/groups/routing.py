"""Which group prefills and which decodes each request: ThunderServe's two-stage transportation program (MLSys 2025).

    max Σ D_ij x_ij    Σ_j x_ij/μ_i + Σ_i x_ij/μ_j <= 1    x_ij <= link_ij    Σ x_ij <= rate    watts <= budget

x_ij are requests/s, D_ij the probability that a request prefilled by i and decoded by j meets its SLO, KV transfer
included. A group that does both divides its time between whole requests of its own (x_ii) and tokens for others, each
at its own rate μ. Weights and groups are given: only shares are chosen here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf, sqrt

import numpy as np

from kvmesh.planner.groups import waiting
from kvmesh.planner.groups.timing import Timing
from kvmesh.planner.solver import Program
from kvmesh.planner.task import Array, Task
from kvmesh.planner.world import Group, Phase, Shard

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Routing:
    """Requests/s of each (prefill, decode) pair of groups, and the probability that they meet their SLO."""

    rates: Mapping[Pair, float]
    attainments: Mapping[Pair, float]
    value: float

    @property
    def total(self) -> float:
        return sum(self.rates.values())

    def through(self, group: int) -> float:
        """Requests/s that the group works for."""
        return sum(rate for pair, rate in self.rates.items() if group in pair)


class Estimator:
    """Timings and capacities of groups, each computed once; `flow` counts requests whatever their latency."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.flow = task.objective == "flow"
        self.timing = lru_cache(maxsize=20_000)(self._timing)
        self.rate = lru_cache(maxsize=20_000)(self._rate)
        self.way = lru_cache(maxsize=50_000)(self._way)
        self.chance = lru_cache(maxsize=50_000)(self._chance)

    def _timing(self, group: Group) -> Timing:
        return Timing(self.task, group)

    def _rate(self, group: Group) -> float:
        """Requests/s within the SLOs."""
        return (waiting.capacity if self.flow else waiting.sustained)(self.timing(group))

    def _way(self, out: tuple[Shard, ...], into: tuple[Shard, ...]) -> tuple[float, float]:
        """(seconds for each token of KV, delay) from one group to another: each layer goes from a host that has it to
        one that shall; hosts send side by side, so the busiest pair of hosts counts."""
        busiest = delay = 0.0
        for shard in out:
            for other in into:
                overlap = max(shard.span[0], other.span[0]), min(shard.span[1], other.span[1])
                if overlap[0] < overlap[1]:
                    link = self.task.link(shard.host, other.host)
                    if link is None:
                        return inf, inf
                    share = self._share(out, shard) * self._share(into, other)
                    busiest = max(busiest, share * self.task.kv_bytes(1, overlap) / link.bytes_per_s)
                    delay = max(delay, link.seconds)
        return busiest, delay

    @staticmethod
    def _share(shards: Sequence[Shard], shard: Shard) -> float:
        """Of a stage's requests."""
        return 1 / sum(other.span == shard.span for other in shards)

    def transfer(self, prefill: Group, decode: Group) -> Array:
        """Seconds for the KV of each request of the sample."""
        seconds, delay = self.way(prefill.shards, decode.shards)
        return self.task.inputs * seconds + delay

    def rate_as(self, group: Group, phase: Phase) -> float:
        """Requests/s for which a group could do only this part. One that does both keeps, in each part, the share of
        its capacity that the SLOs leave of it as a whole."""
        if group.phase is phase:
            return self.rate(group)
        if group.phase is not Phase.MIXED:
            return 0.0
        part, most = self.timing(replace(group, phase=phase)), waiting.capacity(self.timing(group))
        return waiting.capacity(part) * self.rate(group) / most if most else 0.0

    def _chance(self, prefill: Group, decode: Group) -> float:
        """D_ij, both groups at their rates within the SLOs."""
        if self.flow:
            return 1.0
        first = waiting.first_tokens(self.timing(prefill), self.rate(prefill))
        extra = self.transfer(prefill, decode)
        if self._half(decode):
            late = extra / self.task.outputs + self.timing(decode).steps()[1][0] > self.task.slo.tpot
            return first * self._half(decode) * float(1 - late.mean())
        return first * waiting.next_tokens(self.timing(decode), self.rate(decode), extra)

    def _half(self, group: Group) -> float:
        """What a group that does both attains of one SLO, when it attains just enough of both."""
        return sqrt(self.task.slo.attainment) if group.phase is Phase.MIXED else 0.0

    def pairs(self, groups: Sequence[Group]) -> dict[Pair, tuple[float, float]]:
        """(requests/s over the links, D) for each pair that can serve."""
        found: dict[Pair, tuple[float, float]] = {}
        for i, group in enumerate(groups):
            if group.phase is Phase.MIXED:
                found[i, i] = (inf, 1.0 if self.flow else self.task.slo.attainment)
            for j, other in enumerate(groups):
                if group.phase is Phase.PREFILL and other.phase is not Phase.PREFILL:
                    seconds, _ = self.way(group.shards, other.shards)
                    if seconds < inf:
                        link = 1 / (seconds * float(np.mean(self.task.inputs))) if seconds else inf
                        found[i, j] = (link, self.chance(group, other))
        return {pair: (link, chance) for pair, (link, chance) in found.items() if chance > 0}

    def loads(self, groups: Sequence[Group], pair: Pair) -> dict[int, float]:
        """The time that one request a second takes of each group."""
        i, j = pair
        if i == j:
            rates = {i: self.rate(groups[i])}
        else:
            rates = {i: self.rate_as(groups[i], Phase.PREFILL), j: self.rate_as(groups[j], Phase.DECODE)}
        return {group: 1 / rate if rate else inf for group, rate in rates.items()}

    def _all_loads(self, groups: Sequence[Group]) -> dict[Pair, dict[int, float]]:
        """`loads` of every pair of phases that can serve."""
        alone, prefill, decode = (
            [1 / rate if rate else inf for rate in rates]
            for rates in (
                [self.rate(group) if group.phase is Phase.MIXED else 0.0 for group in groups],
                [self.rate_as(group, Phase.PREFILL) if group.phase is Phase.PREFILL else 0.0 for group in groups],
                [self.rate_as(group, Phase.DECODE) if group.phase is not Phase.PREFILL else 0.0 for group in groups],
            )
        )
        pairs = {(i, j): {i: p, j: d} for i, p in enumerate(prefill) for j, d in enumerate(decode) if i != j}
        return pairs | {(i, i): {i: time} for i, time in enumerate(alone)}

    def working_watts(self, group: Group) -> float:
        """What its accelerators draw above idle while they compute."""
        hosts = ((self.task.hosts[shard.host], shard.time * len(shard.accelerators)) for shard in group.shards)
        return sum((host.watts - host.idle_watts) * used / host.accelerators for host, used in hosts)

    def _power(self, groups: Sequence[Group], pairs: Iterable[Pair]) -> tuple[float, list[float]]:
        """What the budget leaves when the hosts of all groups that can serve are on, and what each draws at work."""
        if self.task.power_budget == inf:
            return inf, [0.0] * len(groups)
        on = {shard.host for pair in pairs for number in pair for shard in groups[number].shards}
        idle = sum(self.task.hosts[host].idle_watts for host in on)
        return self.task.power_budget - idle, [self.working_watts(group) for group in groups]

    def route(self, groups: Sequence[Group], rate: float | None = None) -> Routing:
        """The best shares; `rate` caps what arrives. None where the power budget is gone before anything is served."""
        loads = self._all_loads(groups)
        pairs = {pair: found for pair, found in self.pairs(groups).items() if max(loads[pair].values()) < inf}
        if not pairs:
            return Routing({}, {}, 0.0)
        program = Program()
        times = [program.row(upper=1.0) for _ in groups]
        arriving = program.row(upper=inf if rate is None else rate)
        left, watts = self._power(groups, pairs)
        drawn = program.row(upper=left)
        columns = []
        for pair, (link, chance) in pairs.items():
            entries = {times[group]: time for group, time in loads[pair].items()}
            power = sum(time * watts[group] for group, time in loads[pair].items())
            columns.append(program.column({arriving: 1.0, drawn: power, **entries}, cost=chance, limit=link))
        solution = program.solve()
        values = [solution.values[column] for column in columns] if solution else [0.0] * len(columns)
        rates = {pair: value for pair, value in zip(pairs, values, strict=True) if value > 1e-9}
        chances = {pair: pairs[pair][1] for pair in rates}
        return Routing(rates, chances, sum(rates[pair] * chances[pair] for pair in rates))
