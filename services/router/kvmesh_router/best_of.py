"""Samples held back until all have ended, of which the likeliest are given out (`best_of`).

Ranked by the mean log-probability of their tokens. Knows no worker and no connection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from kvmesh_router.events import Choice, Delta


class BestOf:
    """`keep` samples are given out, best first, with log-probabilities if `logprobs`."""

    def __init__(self, keep: int, logprobs: bool) -> None:
        self._keep = keep
        self._logprobs = logprobs
        self._held: dict[int, list[Delta]] = {}

    def hold(self, delta: Delta) -> None:
        self._held.setdefault(delta.index, []).append(delta)

    def best(self, choices: Iterable[Choice]) -> tuple[list[Delta], list[Choice]]:
        """The deltas and ends of the samples kept, renumbered from 0."""
        ranked = sorted(choices, key=lambda choice: -self._likelihood(choice.index))[: self._keep]
        deltas = [
            self._shown(delta, rank) for rank, choice in enumerate(ranked) for delta in self._held.get(choice.index, ())
        ]
        return deltas, [replace(choice, index=rank) for rank, choice in enumerate(ranked)]

    def _shown(self, delta: Delta, rank: int) -> Delta:
        return replace(delta, index=rank, logprobs=delta.logprobs if self._logprobs else ())

    def _likelihood(self, index: int) -> float:
        return _mean([entry.chosen.logprob for delta in self._held.get(index, ()) for entry in delta.logprobs])


def _mean(logprobs: Sequence[float]) -> float:
    return fmean(logprobs) if logprobs else -math.inf
