"""Requests to come for the simulator: drawn from lengths at a Poisson rate, or replayed from a public trace.

Formats and statistics of traces are `kvmesh.bench.workload`'s: what a load generator sends, a simulation serves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from kvmesh.bench import workload
from kvmesh.errors import InvalidArgument
from kvmesh.planner.simulator.deployment import Arrival

TRACES = (".jsonl",)
"""Suffixes of traces that hold more than lengths. Azure's .csv files may be either; see `is_trace`."""


def poisson(lengths: Sequence[tuple[int, int]], rate: float, requests: int, seed: int = 0) -> list[Arrival]:
    """`requests` arrivals at `rate` per second, with (prompt, output) lengths drawn from `lengths`.

    Equal seeds draw equal requests at every rate, only closer together.
    """
    return list(endless(lengths, rate, requests, seed))


def endless(lengths: Sequence[tuple[int, int]], rate: float, requests: int, seed: int = 0) -> Iterator[Arrival]:
    """The same one by one, for runs that are too long to hold."""
    chance = random.Random(seed)
    gaps = (chance.expovariate(1.0) for _ in range(requests))
    for at in accumulate(gaps):
        prompt, output = lengths[chance.randrange(len(lengths))]
        yield Arrival(at / rate, max(1, prompt), max(1, output))


def is_trace(path: Path) -> bool:
    """Whether a file says when its requests came: Mooncake's .jsonl, or an Azure .csv with time stamps."""
    if path.suffix != ".csv":
        return path.suffix in TRACES
    try:
        with path.open() as file:
            return file.readline().startswith("TIMESTAMP")
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}") from None


def replay(path: Path, *, rate: float | None = None, limit: int | None = None, seed: int = 0) -> list[Arrival]:
    """A trace at its own pace or, with the gaps stretched or shrunk alike, at `rate` requests per second on average.

    Raises:
        NotFound, InvalidArgument: as `kvmesh.bench.workload.read_trace`; or it has no requests.
    """
    recorded = workload.read_trace(path, limit=limit, seed=seed)
    if not recorded:
        raise InvalidArgument(f"{path} has no requests")
    length = recorded[-1].at
    factor = len(recorded) / (rate * length) if rate and length else 1.0
    return [
        Arrival(
            one.at * factor,
            one.prompt_tokens,
            one.output_tokens,
            tuple(segment.id for segment in one.prompt) if path.suffix in TRACES else (),
            hash_tokens=workload.MOONCAKE_BLOCK,
        )
        for one in recorded
    ]
