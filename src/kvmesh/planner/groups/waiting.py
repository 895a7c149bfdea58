"""Which share of requests meets an SLO at a given rate, and which rate is the highest that meets it: queueing formulas.

Prompts wait as in an M/G/1 queue whose waiting times decay exponentially; running sequences are a Poisson number with
the mean that Little's law gives. Estimates to search with: the simulator judges what the search has found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import erf, inf, sqrt

import numpy as np

from kvmesh.planner.groups.timing import Timing
from kvmesh.planner.task import Array
from kvmesh.planner.world import Phase

CHUNKS = (64, 128, 256, 512, 1024, 2048)
"""Tokens of prompts in an iteration of a group that does both."""
ROUNDS = 4
PRECISION = 1e-3


def first_tokens(timing: Timing, rate: float, extra: Array | float = 0.0) -> float:
    """Probability that the first token comes in time, `extra` seconds for the way of its KV included."""
    return float(_in_time(timing.task.slo.ttft - timing.first_token - extra, timing.service, rate).mean())


def mean_wait(service: Array, rate: float) -> float:
    """Pollaczek and Khinchine's, for service times of the sample."""
    busy = rate * float(service.mean())
    return rate * float((service**2).mean()) / (2 * (1 - busy)) if busy < 1 else inf


def _in_time(left: Array, service: Array, rate: float) -> Array:
    """P(wait <= left) for each request of the sample; 0 where nothing is left."""
    busy = rate * float(service.mean())
    if busy >= 1:
        return np.zeros(len(left))
    wait = mean_wait(service, rate)
    # P(W > t) = busy·exp(-t·busy / E[W])
    tail = busy * np.exp(-np.maximum(left, 0) * busy / wait) if wait else 0.0
    return np.where(left < 0, 0.0, 1 - tail)


def next_tokens(timing: Timing, rate: float, extra: Array | float = 0.0) -> float:
    """Probability that tokens come in time; `extra` seconds are spent once a request and spread over its tokens."""
    if rate > timing.decode_rate:
        return 0.0
    task = timing.task
    batch = running(timing, rate)
    most = timing.batch_within(task.slo.tpot - np.asarray(extra) / task.outputs)
    return float(np.mean(_at_most(most, batch)))


def running(timing: Timing, rate: float) -> float:
    """Sequences under way: rate · tokens · seconds a token, a fixed point."""
    mean, batch = rate * float(timing.task.outputs.mean()), 1.0
    for _ in range(ROUNDS):
        batch = mean * timing.tpot(batch)
    return batch


def _at_most(most: Array, mean: float) -> Array:
    """P(Poisson(mean) <= most), by the normal distribution."""
    return np.array([_normal((m + 0.5 - mean) / sqrt(max(mean, 1e-9))) if m >= 1 else 0.0 for m in np.atleast_1d(most)])


def _normal(z: float) -> float:
    return (1 + erf(z / sqrt(2))) / 2


@dataclass(frozen=True, slots=True)
class Together:
    """How a group of phase MIXED runs at some rate: seconds of a prompt on the slowest stage, seconds of an iteration
    beside a chunk and alone, the share of time beside chunks, and the sequences under way."""

    service: Array
    beside: float
    alone: float
    busy: float
    batch: float


def _together(timing: Timing, rate: float, chunk: int) -> Together | None:
    """Decodes ride along in every iteration; None beyond what the group can do."""
    task, stages = timing.task, timing.under_way
    batch = 0.0
    for _ in range(ROUNDS):
        alone, beside = timing.tpot(batch), timing.tpot(batch, chunk)
        service = task.inputs / chunk * beside / stages
        busy = rate * float(service.mean())
        batch = rate * float(task.outputs.mean()) * (busy * beside + (1 - busy) * alone)
        if busy >= 1 or batch > timing.max_batch:
            return None
    return Together(service, beside, alone, busy, batch)


def both(timing: Timing, rate: float) -> float:
    """Probability that a group of phase MIXED meets both SLOs, with the best of all chunk sizes."""
    return max(_both(timing, rate, _together(timing, rate, chunk), chunk) for chunk in CHUNKS)


def _both(timing: Timing, rate: float, state: Together | None, chunk: int) -> float:
    if state is None:
        return 0.0
    task = timing.task
    prompts = _in_time(task.slo.ttft - state.service - state.beside, state.service, rate)
    # Of a short output, a larger share may fall beside chunks than on average.
    chunks = float(np.maximum(1.0, task.inputs / chunk).mean())
    share = np.minimum(1.0, state.busy + np.sqrt(state.busy * (1 - state.busy) * chunks / task.outputs))
    tokens = share * state.beside + (1 - share) * state.alone <= task.slo.tpot
    fits = _at_most(np.array([float(timing.max_batch)]), state.batch)[0]
    return float((prompts * tokens).mean() * fits)


def means_of_both(timing: Timing, rate: float) -> tuple[float, float]:
    """Mean seconds to the first token and between tokens of a MIXED group, with its best chunk size."""
    states = [
        (_both(timing, rate, state, chunk), state) for chunk in CHUNKS if (state := _together(timing, rate, chunk))
    ]
    if not states:
        return inf, inf
    state = max(states, key=lambda pair: pair[0])[1]
    first = mean_wait(state.service, rate) + float(state.service.mean()) + state.beside
    return first, state.busy * state.beside + (1 - state.busy) * state.alone


def attainment(timing: Timing, rate: float) -> float:
    """Of the SLOs that concern the group's phase."""
    if not timing.connected:
        return 0.0
    estimates: dict[Phase, Callable[[Timing, float], float]] = {
        Phase.PREFILL: first_tokens,
        Phase.DECODE: next_tokens,
        Phase.MIXED: both,
    }
    return estimates[timing.group.phase](timing, rate)


def capacity(timing: Timing) -> float:
    """Requests/s, at most, whatever their latencies."""
    prefill, decode = timing.prefill_rate, timing.decode_rate
    if timing.group.phase is Phase.MIXED:
        return 1 / (1 / prefill + 1 / decode) if prefill and decode else 0.0
    return prefill if timing.group.phase is Phase.PREFILL else decode


def sustained(timing: Timing) -> float:
    """The highest rate, requests/s, at which the SLOs of the group's phase are met.

    A request must meet two of them; where two groups serve it, each may miss half as many.
    """
    target = timing.task.slo.attainment
    wanted = target if timing.group.phase is Phase.MIXED else sqrt(target)
    ceiling = low = 0.0
    ceiling = high = capacity(timing)
    while high - low > PRECISION * ceiling:
        middle = (low + high) / 2
        low, high = (middle, high) if attainment(timing, middle) >= wanted else (low, middle)
    return low
