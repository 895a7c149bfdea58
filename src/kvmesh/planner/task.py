"""What the algorithms that choose groups and phases see: a cluster, a model with its speeds, a workload, and SLOs.

Refuses what no plan could satisfy, with the host or field and the constraint that fails first. Knows no algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import numpy as np
import numpy.typing as npt

from kvmesh.errors import InvalidArgument
from kvmesh.planner.latency.api import Latency
from kvmesh.planner.problem import islands
from kvmesh.planner.profiles import ModelProfile
from kvmesh.planner.solver import Program
from kvmesh.planner.speeds import KV_SHARE, SpeedBook
from kvmesh.planner.world import SINK, SOURCE, Cluster, Host, Link, Shard, Slo, Span, Workload

SAMPLE = 48
"""Requests of the workload that estimates look at, spread over its prompt lengths."""
BATCHES = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 181, 256, 362, 512)
"""Sizes at which steps are timed; between them they are interpolated."""
Array = npt.NDArray[np.float64]
OBJECTIVES = ("flow", "goodput", "cost", "energy")


@dataclass(frozen=True)
class Task:
    """`kv_ratio`: bytes on the wire over bytes of KV (1/4 for 4-bit codes). `factors`: multiplies the times of a host,
    for what-if questions. `power_budget`: watts that all hosts in use may draw; the others are off."""

    cluster: Cluster
    model: ModelProfile
    workload: Workload
    slo: Slo
    speeds: SpeedBook
    objective: str = "goodput"
    kv_ratio: float = 1.0
    factors: Mapping[int, float] = field(default_factory=dict)
    power_budget: float = inf

    @property
    def hosts(self) -> tuple[Host, ...]:
        return self.cluster.hosts

    @cached_property
    def sample(self) -> tuple[tuple[int, int], ...]:
        """(input, output) of requests at even distances in order of prompt length."""
        lengths = sorted(self.workload.sample())
        places = {round(place) for place in np.linspace(0, len(lengths) - 1, SAMPLE)}
        return tuple(lengths[place] for place in sorted(places))

    @cached_property
    def inputs(self) -> Array:
        return np.array([prompt for prompt, _ in self.sample], dtype=float)

    @cached_property
    def outputs(self) -> Array:
        return np.array([max(1, output) for _, output in self.sample], dtype=float)

    @cached_property
    def context(self) -> float:
        """Tokens of KV that a decoding request holds on average: long outputs count longer."""
        return float(((self.inputs + self.outputs / 2) * self.outputs).sum() / self.outputs.sum())

    def latency(self, shard: Shard) -> Latency:
        """The whole model's, on accelerators like the shard's."""
        return self.speeds.latency(self.hosts[shard.host].accelerator, len(shard.accelerators))

    @cached_property
    def tables(self) -> Tables:
        return Tables(self)

    def factor(self, shard: Shard) -> float:
        """Of the whole model's time, spent on this shard."""
        return self.factors.get(shard.host, 1.0) / shard.time * shard.layers / self.model.layers

    def memory(self, host: int, accelerators: int) -> float:
        return self.hosts[host].memory_bytes / self.hosts[host].accelerators * accelerators

    def max_layers(self, host: int, accelerators: int) -> int:
        """By memory for weights alone."""
        room = int(self.model.weights_share * self.memory(host, accelerators) / self.model.bytes_per_layer + 1e-9)
        return min(room, self.model.layers)

    def kv_positions(self, shard: Shard) -> float:
        """Tokens whose KV of the shard's layers fits beside their weights, in proportion to its time."""
        profile = self.model.machines.get(self.speeds.machine(self.hosts[shard.host].accelerator, shard_size(shard)))
        if profile and shard.layers <= len(profile.kv_entries):
            return shard.time * profile.kv_entries[shard.layers - 1] / shard.layers
        free = KV_SHARE * self.memory(shard.host, shard_size(shard)) - shard.layers * self.model.bytes_per_layer
        return shard.time * max(0.0, free) / (shard.layers * self.model.kv_bytes)

    def link(self, tail: int, head: int) -> Link | None:
        """Between hosts; inside one, accelerators reach each other over its bus."""
        if tail == head and tail >= 0:
            return Link(self.speeds.peer_bytes_per_s(self.hosts[tail].accelerator), 0.0)
        return self.cluster.links.get((tail, head))

    def kv_bytes(self, tokens: float, span: Span) -> float:
        """On the wire, for the layers of a span."""
        return tokens * (span[1] - span[0]) * self.model.kv_bytes * self.kv_ratio


class Tables:
    """Seconds of the whole model by kind of shard, each measured once: over the sample's prompts, over BATCHES."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._known: dict[tuple[str, int, int], Array] = {}

    def prompts(self, shard: Shard) -> Array:
        latency = self._task.latency(shard)
        return self._get(shard, -1, lambda: [latency.prefill([int(n)]) for n in self._task.inputs])

    def steps(self, shard: Shard, chunk: int) -> Array:
        """Of a token for each of a batch, beside `chunk` tokens of a prompt."""
        latency, chunks, context = self._task.latency(shard), [(0, chunk)] if chunk else [], self._task.context
        return self._get(
            shard, chunk, lambda: [latency.iteration(chunks, batch, round(batch * context)) for batch in BATCHES]
        )

    def _get(self, shard: Shard, what: int, measure: Callable[[], list[float]]) -> Array:
        key = self._task.hosts[shard.host].accelerator, len(shard.accelerators), what
        if key not in self._known:
            self._known[key] = np.array(measure())
        return self._known[key]


def shard_size(shard: Shard) -> int:
    return len(shard.accelerators)


def build(
    cluster: Cluster,
    model: ModelProfile,
    workload: Workload,
    slo: Slo,
    speeds: SpeedBook,
    objective: str = "goodput",
    kv_ratio: float = 1.0,
    power_budget: float = inf,
) -> Task:
    """Raises InvalidArgument: one sentence for each fault that names the host or field."""
    if objective not in OBJECTIVES:
        raise InvalidArgument(f"no objective {objective!r}: there are {', '.join(OBJECTIVES)}")
    task = Task(cluster, model, workload, slo, speeds, objective, kv_ratio, power_budget=power_budget)
    for check in (_numbers, _unknown, _too_small, _cut_off, _too_tight, _too_little_power):
        if found := list(check(task)):
            raise InvalidArgument(violations=found)
    return task


def _numbers(task: Task) -> Iterator[tuple[str, str]]:
    slo = task.slo
    for name, value in (("slo.ttft", slo.ttft), ("slo.tpot", slo.tpot), ("kv_ratio", task.kv_ratio)):
        if not value > 0:
            yield name, f"is {value:g}; it must be positive"
    if not 0 < slo.attainment < 1:
        yield "slo.attainment", f"is {slo.attainment:g}; it must lie between 0 and 1"


def _unknown(task: Task) -> Iterator[tuple[str, str]]:
    for host in task.hosts:
        if not task.speeds.knows(host.accelerator):
            known = ", ".join(task.speeds.known())
            yield f"host {host.name}", f"has a {host.accelerator or host.machine}, which is neither of {known}"


def _too_small(task: Task) -> Iterator[tuple[str, str]]:
    rooms = [task.max_layers(i, host.accelerators) for i, host in enumerate(task.hosts)]
    if sum(rooms) < task.model.layers:
        largest = task.hosts[rooms.index(max(rooms))]
        yield (
            f"cluster {task.cluster.name}",
            f"cannot hold {task.model.name}: {task.model.weights_share:.0%} of the memory of its {len(rooms)} hosts has"
            f" room for the weights of {sum(rooms)} layers of {task.model.layers}"
            f" ({task.model.bytes_per_layer / 1e9:.2f} GB each; the largest host, {largest.name}, has"
            f" {largest.memory_bytes / 1e9:.0f} GB)",
        )


def _cut_off(task: Task) -> Iterator[tuple[str, str]]:
    for index, host in enumerate(task.hosts):
        for edge, verb in (((SOURCE, index), "receive"), ((index, SINK), "send")):
            if edge not in task.cluster.links:
                yield f"host {host.name}", f"cannot {verb} tokens: it has no link with the coordinator"
                break
    parts = islands(task.cluster)
    rooms = [sum(task.max_layers(i, task.hosts[i].accelerators) for i in part) for part in parts]
    if max(rooms) < task.model.layers:
        best = parts[rooms.index(max(rooms))]
        outside = next(part for part in parts if part is not best)
        yield (
            f"host {task.hosts[min(outside)].name}",
            f"has no link to the region of host {task.hosts[min(best)].name}, and the {len(best)} hosts there have room"
            f" for only {max(rooms)} of {task.model.layers} layers of {task.model.name}",
        )


def _too_tight(task: Task) -> Iterator[tuple[str, str]]:
    """Even on the fastest accelerators, alone, in all the tensor parallelism that a host has."""
    kinds = {(host.accelerator, host.accelerators) for host in task.hosts}
    latencies = [task.speeds.latency(name, size) for name, most in kinds for size in task.speeds.sizes(name, most)]
    step = min(latency.decode(1, round(task.context)) for latency in latencies)
    if step > task.slo.tpot:
        yield (
            "slo.tpot",
            f"is {task.slo.tpot:g} s, and a lone request's token takes {step:.3g} s on the fastest host of"
            f" {task.cluster.name}",
        )
    shares = [np.mean([latency.prefill([n]) <= task.slo.ttft for n, _ in task.sample]) for latency in latencies]
    if max(shares) < task.slo.attainment:
        longest = task.sample[min(len(task.sample) - 1, int(task.slo.attainment * len(task.sample)))][0]
        yield (
            "slo.ttft",
            f"is {task.slo.ttft:g} s, and only {max(shares):.0%} of the prompts are computed so soon even alone on the"
            f" fastest host ({longest} tokens take {min(la.prefill([longest]) for la in latencies):.3g} s);"
            f" {task.slo.attainment:.0%} are asked for",
        )


def _too_little_power(task: Task) -> Iterator[tuple[str, str]]:
    """The hosts that hold the model, chosen for their idle watts, must leave some for work."""
    if task.power_budget == inf:
        return
    program = Program()
    layers = program.row(lower=float(task.model.layers))
    for number, host in enumerate(task.hosts):
        room = float(task.max_layers(number, host.accelerators))
        program.column({layers: room}, -host.idle_watts, 1.0, integer=True)
    solution = program.solve()
    least = -solution.objective if solution else inf
    if least >= task.power_budget:
        yield (
            "power_budget",
            f"is {task.power_budget:g} W, and the hosts of {task.cluster.name} that hold {task.model.name} draw"
            f" {least:g} W at least while they do nothing",
        )
