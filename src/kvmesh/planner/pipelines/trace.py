"""The conversation trace that ships with the planner: lengths of requests, and how many came in each interval."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache

from kvmesh.planner.catalogue import DATA
from kvmesh.planner.workload_file import read_lengths

AZURE = DATA / "azure"


@cache
def lengths() -> Sequence[tuple[int, int]]:
    """(prompt, output) tokens in the order of the trace: seeded draws depend on it."""
    return read_lengths(AZURE / "conv_lengths.csv")


@cache
def counts() -> Sequence[int]:
    """Requests in each interval of 3 s."""
    with (AZURE / "conv_arrivals_per_3s.csv").open() as file:
        return tuple(int(row["requests_in_3s"]) for row in csv.DictReader(file))
