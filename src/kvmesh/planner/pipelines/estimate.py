"""Decode tokens/s of a placement without simulating it: how long a token's round is, and how many requests fit.

Little's law closes the loop: X tokens/s take X · R(X) requests at once, R being the round of a decode step through all
layers, and the KV has room for N. At a host that serves decodes before chunks of prompts, a step waits for the rest of
the batch under way and then takes its own; batches grow with the rate, and so does R. Links add latency and, where they
are slow, the time of a message. A ranking, not a promise: bunching and the spread of lengths are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvmesh.planner.pipelines.execution import BatchTimes

PASSES = 4
"""Of the fixed point between batch size and batch time."""
BISECTIONS = 18
FULL = 0.98
"""Highest share of a host's time that can be planned with."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A host that `share` of the requests pass; it has KV room for `room` of them."""

    times: BatchTimes
    share: float
    room: float


@dataclass(frozen=True, slots=True)
class Crossing:
    """Links between two sites: `seconds` on the way, `tokens_per_s` together."""

    seconds: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean request and how prompts are cut."""

    prompt: float
    output: float
    chunk: int


def tokens_per_s(visits: Sequence[Visit], crossings: Iterable[Crossing], mean: Mean) -> float:
    """The largest X whose requests have room."""
    crossings = tuple(crossings)
    room = min((visit.room / visit.share for visit in visits if visit.share), default=0.0)
    low, high = 0.0, 1e4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        seconds = round_seconds(visits, crossings, mean, middle)
        low, high = (middle, high) if seconds is not None and middle * seconds <= room else (low, middle)
    return low


def round_seconds(visits: Sequence[Visit], crossings: Iterable[Crossing], mean: Mean, rate: float) -> float | None:
    """A decode step's way through all layers at `rate` tokens/s; None if a host or link cannot keep up."""
    total = 0.0
    for crossing in crossings:
        load = rate * (1 + mean.prompt / mean.output) / crossing.tokens_per_s
        if load > FULL:
            return None
        total += crossing.seconds
    for visit in visits:
        step = _step(visit, mean, rate * visit.share)
        if step is None:
            return None
        total += visit.share * step
    return total


def _step(visit: Visit, mean: Mean, rate: float) -> float | None:
    """Seconds a decode step spends at a host: what is left of the batch under way, then its own."""
    chunk = visit.times.prompt[mean.chunk]
    chunks = rate * mean.prompt / mean.output / mean.chunk
    prompts = chunks * chunk
    if prompts > FULL:
        return None
    batch, cycle = 1.0, 0.0
    for _ in range(PASSES):
        cycle = visit.times.decode[min(int(batch) + 1, visit.times.decodes)] / (1 - prompts)
        batch = max(1.0, rate * cycle)
    if batch > visit.times.decodes:
        return None
    own = visit.times.decode[int(batch) + 1 if batch < visit.times.decodes else visit.times.decodes]
    together = min(1.0, chunks * cycle) * chunk
    busy = min(1.0, prompts + rate * own / batch)
    return own + together + busy * (own + together) / 2
