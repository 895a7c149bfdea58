"""A load replayed on a fleet: latencies, joules, and the power of the row as it goes.

Instances can be switched, by a `Controller` that is asked at every tick, be set to other clocks, and take one phase
only: then KV goes over to a decode instance. Knows neither links nor chunked prefill: it answers questions of power,
not of placement.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Protocol

from kvmesh.planner.power.instance import Instance, Request


@dataclass(frozen=True, slots=True)
class Reading:
    """The row at a tick: mean watts since the last one, requests that came since, instances on."""

    time: float
    watts: Sequence[float]
    arrivals: int
    on: int

    @property
    def total(self) -> float:
        return sum(self.watts)


class Controller(Protocol):
    """Switches and sets instances at every tick."""

    def act(self, reading: Reading, fleet: Sequence[Instance]) -> None: ...


class Nothing:
    """Everything stays as it is."""

    def act(self, reading: Reading, fleet: Sequence[Instance]) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """Requests with their times, and a reading for each tick."""

    requests: Sequence[Request]
    readings: Sequence[Reading]
    joules: float

    @property
    def joules_per_token(self) -> float:
        """For each output token of requests that ended."""
        return self.joules / sum(request.output for request in self.requests if request.end < inf)

    def attainment(self, ttft: float, tpot: float, low_priority: bool | None = None) -> float:
        """Share of requests that met both limits."""
        chosen = [r for r in self.requests if low_priority is None or r.low_priority == low_priority]
        return sum(request.meets(ttft, tpot) for request in chosen) / max(1, len(chosen))


def replay(
    requests: Sequence[Request],
    fleet: Sequence[Instance],
    controller: Controller = Nothing(),
    tick: float = 2.0,
    progress: Callable[[float], None] = lambda time: None,
) -> Outcome:
    """Serves `requests`, sorted by arrival, each on the instance that is on with the fewest tokens pending; all end.

    Low-priority requests go to low-priority instances, if the fleet has any.
    """
    readings: list[Reading] = []
    for instance in fleet:
        instance.hand_over = partial(_hand_over, fleet)
    spent = [0.0] * len(fleet)
    split = any(instance.low_priority for instance in fleet)
    queue = deque(requests)
    for time in _ticks(requests, fleet, tick):
        arrivals = len(queue)
        while queue and queue[0].arrival < time:
            _place(queue.popleft(), fleet, split)
        _advance(fleet, time)
        now = [instance.joules_at(time) for instance in fleet]
        watts = [(after - before) / tick for before, after in zip(spent, now, strict=True)]
        spent = now
        readings.append(Reading(time, watts, arrivals - len(queue), sum(instance.on for instance in fleet)))
        controller.act(readings[-1], fleet)
        progress(time)
    return Outcome(requests, readings, sum(spent))


def _ticks(requests: Sequence[Request], fleet: Sequence[Instance], tick: float) -> Iterator[float]:
    """Until everything has arrived and ended."""
    time, last = 0.0, requests[-1].arrival if requests else 0.0
    while time <= last or any(instance.requests for instance in fleet):
        time += tick
        yield time


def _place(request: Request, fleet: Sequence[Instance], split: bool) -> None:
    able = [one for one in fleet if one.on and one.phase.prefills]
    able = [one for one in able if not split or one.low_priority == request.low_priority]
    _advance(fleet, request.arrival)
    min(able, key=lambda instance: instance.pending).submit(request)


def _advance(fleet: Sequence[Instance], time: float) -> None:
    """Those that hand over first: what they give is there when the others get to it."""
    for instance in sorted(fleet, key=lambda one: one.phase.decodes):
        instance.advance(time)


def _hand_over(fleet: Sequence[Instance], request: Request, ready: float) -> None:
    able = [instance for instance in fleet if instance.on and instance.phase.decodes]
    min(able, key=lambda instance: instance.pending).receive(request, ready)
