"""Where requests come from: as many as the KV has room for (offline), or at given times (online).

Both are Helix's: offline, 20 requests to begin with, then one more whenever a prompt or a request is done and no layer
is fuller than 0.8; online, a trace's arrivals per 3 s, drawn at random and scaled to a rate. Lengths are drawn from a
trace. Everything follows from the seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random

from kvmesh.planner.pipelines.jobs import Request
from kvmesh.planner.pipelines.simulation import Simulation

Lengths = Sequence[tuple[int, int]]
"""(prompt, output) tokens of past requests."""

FIRST_REQUESTS = 20
APART = 0.1
"""Seconds between the first requests, and before a next one."""
FEED_LIMIT = 0.8
SLICE = 3.0
"""Seconds for which a trace counts its arrivals."""


class Offline:
    """Keeps the cluster as full as `limit`; a request that finds no path is dropped, another will come."""

    def __init__(self, lengths: Lengths, seed: int = 0, limit: float = FEED_LIMIT) -> None:
        self.lengths, self.random, self.limit = lengths, Random(seed), limit

    def start(self, simulation: Simulation) -> None:
        for number in range(FIRST_REQUESTS):
            self._add(simulation, number * APART)

    def prompt_done(self, simulation: Simulation) -> None:
        if simulation.scheduler.ledger.fullest() <= self.limit:
            self._add(simulation, simulation.clock.now + APART)

    def request_done(self, simulation: Simulation) -> None:
        self.prompt_done(simulation)

    def turned_away(self, simulation: Simulation, request: Request) -> None:
        if not simulation.running:
            self._add(simulation, simulation.clock.now + APART)

    def _add(self, simulation: Simulation, time: float) -> None:
        prompt, output = _draw(self.lengths, self.random)
        simulation.clock.at(time, simulation.submit, Request(prompt, output, time))


class Population:
    """So many requests at once, whatever the KV: how Helix ran the schedulers that do not look at it."""

    def __init__(self, lengths: Lengths, requests: int, seed: int = 0) -> None:
        self.lengths, self.random, self.requests = lengths, Random(seed), requests

    def start(self, simulation: Simulation) -> None:
        for number in range(self.requests):
            self._add(simulation, number * APART)

    def prompt_done(self, simulation: Simulation) -> None:
        pass

    def request_done(self, simulation: Simulation) -> None:
        self._add(simulation, simulation.clock.now + APART)

    def turned_away(self, simulation: Simulation, request: Request) -> None:
        self._add(simulation, simulation.clock.now + APART)

    def _add(self, simulation: Simulation, time: float) -> None:
        prompt, output = _draw(self.lengths, self.random)
        simulation.clock.at(time, simulation.submit, Request(prompt, output, time))


class Backlog:
    """Offline, ours: `prompts` are under way at any time, as a prompt that waits inside only holds KV; one that finds
    no path stays first in line, so that long ones are not passed over."""

    def __init__(self, lengths: Lengths, prompts: int, seed: int = 0, limit: float = FEED_LIMIT) -> None:
        self.lengths, self.random, self.limit, self.prompts = lengths, Random(seed), limit, prompts
        self.under_way = 0
        self.first: Request | None = None

    def start(self, simulation: Simulation) -> None:
        self._refill(simulation)

    def prompt_done(self, simulation: Simulation) -> None:
        self.under_way -= 1
        self._refill(simulation)

    def request_done(self, simulation: Simulation) -> None:
        self._refill(simulation)

    def turned_away(self, simulation: Simulation, request: Request) -> None:
        self.under_way -= 1
        self.first = request

    def _refill(self, simulation: Simulation) -> None:
        waited = False
        while not waited and self.under_way < self.prompts and simulation.scheduler.ledger.fullest() <= self.limit:
            request = self.first or Request(*_draw(self.lengths, self.random), simulation.clock.now)
            request.asked = simulation.clock.now
            self.first = None
            self.under_way += 1
            simulation.submit(request)
            waited = self.first is not None


class Online:
    """Given arrivals; a request without a path waits at the coordinator, first come first served."""

    def __init__(self, arrivals: Sequence[tuple[float, int, int]]) -> None:
        self.arrivals = arrivals
        self.waiting: deque[Request] = deque()

    def start(self, simulation: Simulation) -> None:
        for time, prompt, output in self.arrivals:
            simulation.clock.at(time, self._arrive, (simulation, Request(prompt, output, time)))

    def _arrive(self, arrival: tuple[Simulation, Request]) -> None:
        simulation, request = arrival
        if self.waiting:
            self.waiting.append(request)
        else:
            simulation.submit(request)

    def prompt_done(self, simulation: Simulation) -> None:
        pass

    def request_done(self, simulation: Simulation) -> None:
        waiting, self.waiting = self.waiting, deque()
        while waiting and not self.waiting:
            simulation.submit(waiting.popleft())
        self.waiting += waiting

    def turned_away(self, simulation: Simulation, request: Request) -> None:
        self.waiting.append(request)


def arrivals(
    lengths: Lengths, counts: Sequence[int], tokens_per_s: float, seconds: float, seed: int = 0
) -> list[tuple[float, int, int]]:
    """(time, prompt, output) at `tokens_per_s` on average, prompt and output together, with the trace's burstiness."""
    random = Random(seed)
    mean = sum(prompt + output for prompt, output in lengths) / len(lengths)
    scale = SLICE * tokens_per_s / mean / (sum(counts) / len(counts))
    rows: list[tuple[float, int, int]] = []
    carried = 0.0
    for number in range(int(seconds / SLICE)):
        wanted = scale * counts[random.randint(0, len(counts) - 1)] + carried
        count = round(wanted)
        carried = wanted - count
        times = sorted(number * SLICE + SLICE * random.random() for _ in range(count))
        rows += [(time, *_draw(lengths, random)) for time in times]
    return rows


def _draw(lengths: Lengths, random: Random) -> tuple[int, int]:
    return lengths[random.randint(0, len(lengths) - 1)]
