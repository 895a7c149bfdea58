"""Whom a policy is shown: all workers, or a few drawn at random, which is enough to balance well (Mitzenmacher, 2001).

A policy looks at every worker that it is shown, so with a thousand of them the looking costs more than all the rest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvmesh.types import WorkerInfo


class Crowd:
    """`candidates`: how many of each role to draw; None: all."""

    def __init__(self, workers: Sequence[WorkerInfo], candidates: int | None = None, seed: int = 0) -> None:
        roles = dict.fromkeys(worker.role for worker in workers)
        self._all = workers
        self._by_role = [[worker for worker in workers if worker.role is role] for role in roles]
        self._candidates = candidates
        self._chance = random.Random(seed)

    def some(self) -> Sequence[WorkerInfo]:
        """For one decision."""
        if self._candidates is None:
            return self._all
        count = self._candidates
        return [one for group in self._by_role for one in self._chance.sample(group, min(count, len(group)))]
