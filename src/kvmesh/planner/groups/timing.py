"""Seconds and rates of one group: its stages work like a pipeline, each as fast as its shards together.

A stage is a run of layers that the same shards hold; where spans overlap without being equal, a shard belongs to
several and computes only a part of its layers for some requests. Shares of the work are such that the busiest shard has
least to do. As many batches are under way at once as keep it busy, so a token takes as long as one batch needs for all
stages. Links inside a group carry activations. Knows neither queues nor other groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf

import numpy as np

from kvmesh.planner.latency.api import Chunk
from kvmesh.planner.solver import Program
from kvmesh.planner.task import BATCHES, Array, Task
from kvmesh.planner.world import SINK, SOURCE, Group, Link, Phase, Shard, Span

KV_USE = 0.9
"""Of the room for KV, that running requests fill at most."""
TYPICAL_BATCH = 8
TYPICAL = BATCHES.index(TYPICAL_BATCH)
SIZES = np.array(BATCHES, dtype=float)
NOTHING = 1e-9


@dataclass(frozen=True, slots=True)
class Part:
    """What a shard does in a stage: its share of the requests, and of the whole model's time for each of them."""

    shard: Shard
    share: float
    factor: float
    layers: int


class Timing:
    """Of one group under a task; `batch` is always the number of sequences in the whole group."""

    def __init__(self, task: Task, group: Group) -> None:
        self.task, self.group = task, group
        self.stages = _stages(task, group)
        self.hops = self._hops()

    # Links between stages.

    def _hops(self) -> list[Link]:
        """From the coordinator through all stages and back; a stage of several shards sends in parallel."""
        hosts = [[SOURCE], *([part.shard.host for part in stage] for stage in self.stages), [SINK]]
        return [self._hop(out, into) for out, into in pairwise(hosts)]

    def _hop(self, out: list[int], into: list[int]) -> Link:
        links = [link for u in out for v in into if (link := self.task.link(u, v))]
        if not links:
            return Link(0.0, inf)
        return Link(sum(link.bytes_per_s for link in links), max(link.seconds for link in links))

    def _hop_seconds(self, tokens: Array | float) -> list[Array | float]:
        """What each hop's wires are busy for; the coordinator's carry token ids."""
        model = self.task.model
        sizes = [model.token_bytes, *[model.activation_bytes] * (len(self.hops) - 2), model.token_bytes]
        return [
            tokens * size / hop.bytes_per_s if hop.bytes_per_s else inf
            for hop, size in zip(self.hops, sizes, strict=True)
        ]

    @cached_property
    def connected(self) -> bool:
        return bool(self.stages) and all(hop.bytes_per_s > 0 for hop in self.hops)

    @property
    def delay(self) -> float:
        """Of an empty message through all stages."""
        return sum(hop.seconds for hop in self.hops)

    # Prompts, one at a time.

    @cached_property
    def _prompts(self) -> tuple[Array, Array]:
        """For each request of the sample: seconds until its first token, and seconds of the busiest shard or link."""
        inputs, wires = self.task.inputs, self._hop_seconds(self.task.inputs)
        fill = np.zeros(len(inputs)) + self.delay
        busy: dict[Shard, Array] = {}
        for part in (part for stage in self.stages for part in stage):
            seconds = part.share * part.factor * self.task.tables.prompts(part.shard)
            fill = fill + seconds
            busy[part.shard] = busy.get(part.shard, np.zeros(len(inputs))) + seconds
        links = [np.broadcast_to(seconds, inputs.shape) for seconds in wires]
        return fill + np.sum(links, axis=0), np.max([*busy.values(), *links], axis=0)

    @property
    def first_token(self) -> Array:
        """Seconds from the start of a prompt to its first token, for each request of the sample."""
        return self._prompts[0]

    @property
    def service(self) -> Array:
        """Seconds for which a prompt keeps the busiest shard, for each request of the sample."""
        return self._prompts[1]

    @cached_property
    def prefill_rate(self) -> float:
        """Prompts/s, at most."""
        return 1 / float(self.service.mean()) if self.connected else 0.0

    # Tokens, in batches.

    @cached_property
    def max_batch(self) -> int:
        """Sequences whose KV fits, at most."""
        used: dict[Shard, float] = {}
        for part in (part for stage in self.stages for part in stage):
            used[part.shard] = used.get(part.shard, 0.0) + part.share * part.layers
        room = min(self.task.kv_positions(shard) * shard.layers / layers for shard, layers in used.items())
        return int(min(KV_USE * room / self.task.context, self.most_running))

    @property
    def most_running(self) -> int:
        """Sequences at once, at most."""
        return BATCHES[-1] * self.under_way

    @cached_property
    def _steps(self) -> dict[int, tuple[Array, Array]]:
        return {}

    def steps(self, chunk: int = 0) -> tuple[Array, Array]:
        """Batches of the whole group, and the seconds between a sequence's tokens then, beside `chunk` tokens of
        prompts in every batch."""
        if chunk not in self._steps:
            total, busiest = self._laps(chunk)
            self._steps[chunk] = SIZES * self.under_way, np.maximum(total, self.under_way * busiest)
        return self._steps[chunk]

    @cached_property
    def under_way(self) -> int:
        """Batches in the pipeline at once."""
        total, busiest = self._laps(0)
        return min(len(self.stages), max(1, round(float(total[TYPICAL] / busiest[TYPICAL]))))

    def _laps(self, chunk: int) -> tuple[Array, Array]:
        """As `_busy`, for all of BATCHES."""
        wires = [np.broadcast_to(seconds, SIZES.shape) for seconds in self._hop_seconds(SIZES + chunk)]
        busy: dict[Shard, Array] = {}
        total = self.delay + np.sum(wires, axis=0)
        for stage in self.stages:
            times = [self._part_laps(part, chunk) for part in stage]
            total = total + np.max(times, axis=0)
            for part, seconds in zip(stage, times, strict=True):
                busy[part.shard] = busy.get(part.shard, 0.0) + seconds
        return total, np.asarray(np.max([*busy.values(), *wires], axis=0))

    def _part_laps(self, part: Part, chunk: int) -> Array:
        table = self.task.tables.steps(part.shard, round(chunk * part.share))
        return np.asarray(part.factor * np.interp(np.maximum(1.0, SIZES * part.share), SIZES, table))

    def lap(self, chunks: Sequence[Chunk], batch: int, context: int) -> float:
        """Seconds in which each of the batches under way, of `batch` sequences, gets one token."""
        total, busiest = self._busy(chunks, batch, context)
        return max(total, self.under_way * busiest)

    def slowest(self, chunks: Sequence[Chunk], batch: int, context: int) -> float:
        """Seconds that the busiest shard or link takes for a batch."""
        return self._busy(chunks, batch, context)[1]

    def _busy(self, chunks: Sequence[Chunk], batch: int, context: int) -> tuple[float, float]:
        """Seconds of a batch through all stages, and on the busiest shard or link."""
        wires = [float(seconds) for seconds in self._hop_seconds(batch + sum(tokens for _, tokens in chunks))]
        busy: dict[Shard, float] = {}
        total = self.delay + sum(wires)
        for stage in self.stages:
            times = [self._part_seconds(part, chunks, batch, context) for part in stage]
            total += max(times)
            for part, seconds in zip(stage, times, strict=True):
                busy[part.shard] = busy.get(part.shard, 0.0) + seconds
        return total, max(*busy.values(), *wires)

    def _part_seconds(self, part: Part, chunks: Sequence[Chunk], batch: int, context: int) -> float:
        if part.share < 1:
            chunks = [(start, max(1, round(tokens * part.share))) for start, tokens in chunks]
            batch, context = (max(1, round(batch * part.share)) if batch else 0), round(context * part.share)
        return part.factor * self.task.latency(part.shard).iteration(chunks, batch, context)

    def tpot(self, batch: float, chunk: int = 0) -> float:
        """Seconds between a sequence's tokens when `batch` sequences are under way."""
        return float(np.interp(batch, *self.steps(chunk)))

    def batch_within(self, seconds: Array | float) -> Array:
        """Sequences under way, at most, for tokens `seconds` apart; 0 where one alone is slower."""
        batches, steps = self.steps()
        sizes = np.interp(seconds, np.maximum.accumulate(steps), batches)
        return np.where(np.asarray(seconds) < steps[0], 0.0, np.minimum(sizes, self.max_batch))

    @cached_property
    def decode_rate(self) -> float:
        """Requests/s, at most, when KV is full."""
        if not self.connected or self.max_batch < 1:
            return 0.0
        mean = float(self.task.outputs.mean())
        batches = [batch for batch in self.steps()[0] if batch <= self.max_batch] + [float(self.max_batch)]
        return max(float(batch) / (self.tpot(float(batch)) * mean) for batch in batches)


def cut(group: Group, layers: int) -> list[tuple[Span, list[Shard]]]:
    """Runs of layers held by the same shards, in order; empty if some layer is held by none."""
    borders = sorted({end for shard in group.shards for end in shard.span})
    runs = [
        ((first, end), [s for s in group.shards if s.span[0] <= first and end <= s.span[1]])
        for first, end in pairwise(borders)
    ]
    whole = bool(borders) and borders[0] == 0 and borders[-1] == layers and all(shards for _, shards in runs)
    return runs if whole else []


def _stages(task: Task, group: Group) -> list[list[Part]]:
    runs = cut(group, task.model.layers)
    units = {shard: layer_seconds(task, group.phase, shard) for shard in group.shards}
    alone = all({shard.span for shard in shards} == {span} for span, shards in runs)
    shares = _proportional(runs, units) if alone else _levelled(runs, units)
    return [
        [
            Part(shard, share, task.factor(shard) * (span[1] - span[0]) / shard.layers, span[1] - span[0])
            for shard, share in zip(shards, parts, strict=True)
            if share > NOTHING
        ]
        for (span, shards), parts in zip(runs, shares, strict=True)
    ]


def layer_seconds(task: Task, phase: Phase, shard: Shard, under_way: int = 1) -> float:
    """Of one layer, for a mean request; KV is shared by so many batches, one of which the shard computes at a time."""
    prompt = float(task.tables.prompts(shard).mean())
    room = KV_USE * task.kv_positions(shard) / task.context / under_way
    step = float(np.interp(max(1.0, room), SIZES, task.tables.steps(shard, 0)))
    tokens = step / min(max(room, NOTHING), BATCHES[-1]) * float(task.outputs.mean())
    work = {Phase.PREFILL: prompt, Phase.DECODE: tokens, Phase.MIXED: prompt + tokens}[phase]
    return float(task.factor(shard) / shard.layers * work)


Runs = Sequence[tuple[Span, list[Shard]]]


def _proportional(runs: Runs, units: dict[Shard, float]) -> list[list[float]]:
    """Of each run, in proportion to speed."""
    totals = [sum(1 / units[shard] for shard in shards) for _, shards in runs]
    return [[1 / units[s] / total for s in shards] for (_, shards), total in zip(runs, totals, strict=True)]


def _levelled(runs: Runs, units: dict[Shard, float]) -> list[list[float]]:
    """Where shards have part in several runs: the shares whose busiest shard is busy for the shortest time."""
    program = Program()
    loads = {shard: program.row(upper=0.0) for shard in units}
    program.column(dict.fromkeys(loads.values(), -1.0), cost=-1.0)
    columns = []
    for (first, end), shards in runs:
        whole = program.row(1.0, 1.0)
        columns.append([program.column({whole: 1.0, loads[s]: (end - first) * units[s]}) for s in shards])
    solution = program.solve()
    return [[solution.values[column] if solution else 0.0 for column in part] for part in columns]
