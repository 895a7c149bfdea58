"""Per-request pipelines over layer spans: Helix's interleaved weighted round-robin with KV high-water marks.

Every request gets a path of its own, hop by hop: among the next hosts that the masks leave, the one whose load would be
the least after it, where work adds work / flow to a load (Helix, ASPLOS 2025, section 5). Its decode steps follow the
same path, because its KV is there. A hop is masked if it carries less than 5 % of its host's flow, or if the KV that
the request is expected to need would pass the high-water mark of the next host.

Knows hosts as numbers, and neither time, links nor models. Baselines share the masks and differ in the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from random import Random

LEAST_SHARE = 0.05
"""Hops with less of their host's flow are not used."""
SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Room:
    """What a host can hold: layers [first, end), and KV entries (token positions x layers)."""

    first: int
    end: int
    entries: float

    @property
    def layers(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Marks:
    """Up to which share of its KV room a host is filled, and what a request is expected to need."""

    high_water: float
    output_share: float
    """Of the mean output, expected of every request."""
    mean_output: float

    def expected(self, prompt_tokens: int) -> int:
        """Token positions."""
        return int(prompt_tokens + self.output_share * self.mean_output)


ONLINE, OFFLINE = (0.9, 0.6), (0.85, 1.0)
"""Helix's (high-water mark, output share)."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Hosts by number, what they hold, and the flow of every hop, tokens/s. Source and sink are the coordinator."""

    source: int
    sink: int
    rooms: Mapping[int, Room]
    hops: Mapping[int, Mapping[int, float]]

    def usable(self) -> dict[int, dict[int, float]]:
        """Hops that carry enough of their host's flow."""
        floor = {host: LEAST_SHARE * sum(heads.values()) for host, heads in self.hops.items()}
        return {
            host: {head: flow for head, flow in heads.items() if flow > 0 and flow >= floor[host]}
            for host, heads in self.hops.items()
        }


@dataclass(frozen=True, slots=True)
class Route:
    """A request's path, without the coordinator, and the token positions reserved on it."""

    hosts: tuple[int, ...]
    positions: int


@dataclass(slots=True)
class KvLedger:
    """KV entries that running requests are expected to need, host by host."""

    rooms: Mapping[int, Room]
    marks: Marks
    used: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.used = dict.fromkeys(self.rooms, 0)

    def fits(self, host: int, positions: int) -> bool:
        room = self.rooms[host]
        return self.used[host] + positions * room.layers <= self.marks.high_water * room.entries

    def reserve(self, route: Route, sign: int = 1) -> None:
        for host in route.hosts:
            self.used[host] += sign * route.positions * self.rooms[host].layers

    def fullest(self) -> float:
        """Share of the KV room in use, of the layer that is the fullest over all its hosts."""
        layers = max(room.end for room in self.rooms.values())
        used, total = [0.0] * layers, [0.0] * layers
        for host, room in self.rooms.items():
            for layer in range(room.first, room.end):
                used[layer] += self.used[host] / room.layers
                total[layer] += room.entries / room.layers
        return max(u / t if t else 1.0 for u, t in zip(used, total, strict=True))


class PipelineScheduler:
    """Chooses a path for every request. Subclasses say which of the hops that are left is taken."""

    def __init__(self, topology: Topology, marks: Marks) -> None:
        self.topology = topology
        self.ledger = KvLedger(topology.rooms, marks)
        self.hops = topology.usable()

    def route(self, prompt_tokens: int) -> Route | None:
        """A path, its KV reserved; None if no path has room now. Whoever gets one must call `finish`."""
        positions = self.ledger.marks.expected(prompt_tokens)
        path = [self.topology.source]
        while path[-1] != self.topology.sink:
            heads = [head for head in self.hops[path[-1]] if head == self.topology.sink or self._fits(head, positions)]
            if not heads:
                self._charge(path, -prompt_tokens)
                return None
            path.append(self.choose(path[-1], heads, prompt_tokens))
            self._charge(path[-2:], prompt_tokens)
        route = Route(tuple(path[1:-1]), positions)
        self.ledger.reserve(route)
        return route

    def step(self, route: Route) -> None:
        """One decode step of a request goes its way."""
        self._charge([self.topology.source, *route.hosts, self.topology.sink], 1)

    def finish(self, route: Route) -> None:
        """The request is done: its KV is free."""
        self.ledger.reserve(route, -1)

    def observe(self, tail: int, head: int, seconds: float) -> None:
        """How long a request took from leaving `tail` to leaving `head`."""

    def choose(self, host: int, heads: Sequence[int], work: int) -> int:
        raise NotImplementedError

    def charge(self, tail: int, head: int, work: int) -> None:
        """Work that a hop takes on; negative when a request found no path after all."""

    def _fits(self, host: int, positions: int) -> bool:
        return self.ledger.fits(host, positions)

    def _charge(self, path: Sequence[int], work: int) -> None:
        for tail, head in pairwise(path):
            self.charge(tail, head, work)


class InterleavedRoundRobin(PipelineScheduler):
    """Helix's choice: shares of work converge to shares of flow, without bursts."""

    def __init__(self, topology: Topology, marks: Marks) -> None:
        super().__init__(topology, marks)
        self.loads = {host: dict.fromkeys(heads, 0.0) for host, heads in self.hops.items()}

    def choose(self, host: int, heads: Sequence[int], work: int) -> int:
        loads, flows = self.loads[host], self.hops[host]
        return min(heads, key=lambda head: loads[head] + work / flows[head])

    def charge(self, tail: int, head: int, work: int) -> None:
        self.loads[tail][head] += work / self.hops[tail][head]


class RandomRoutes(PipelineScheduler):
    """Baseline: every hop that exists and has room is as likely as any other, whatever its flow."""

    def __init__(self, topology: Topology, marks: Marks, seed: int = 0) -> None:
        super().__init__(topology, marks)
        self.hops = {host: dict(heads) for host, heads in topology.hops.items()}
        self.random = Random(seed)

    def choose(self, host: int, heads: Sequence[int], work: int) -> int:
        return self.random.choice(heads)


class SwarmRoutes(RandomRoutes):
    """Baseline: stochastic wiring of SWARM (Ryabinin et al., ICML 2023): round-robin by smoothed response times."""

    def __init__(self, topology: Topology, marks: Marks, seed: int = 0) -> None:
        super().__init__(topology, marks, seed)
        self.seconds = {host: dict.fromkeys(heads, 1.0) for host, heads in self.hops.items()}
        self.priority = {host: dict.fromkeys(heads, 0.0) for host, heads in self.hops.items()}

    def choose(self, host: int, heads: Sequence[int], work: int) -> int:
        chosen = min(heads, key=lambda head: self.priority[host][head])
        self.priority[host][chosen] += self.seconds[host][chosen]
        return chosen

    def observe(self, tail: int, head: int, seconds: float) -> None:
        mean = self.seconds[tail].get(head, inf)
        self.seconds[tail][head] = seconds if mean == inf else mean + SMOOTHING * (seconds - mean)


class ShortestQueueRoutes(RandomRoutes):
    """Baseline: the next host with the fewest requests waiting, at random among equals."""

    def __init__(self, topology: Topology, marks: Marks, waiting: Callable[[int], int], seed: int = 0) -> None:
        super().__init__(topology, marks, seed)
        self.waiting = waiting

    def choose(self, host: int, heads: Sequence[int], work: int) -> int:
        least = min(map(self.waiting, heads))
        return self.random.choice([head for head in heads if self.waiting(head) == least])
