"""How engines scheduled before chunked prefill: whole prompts first, while all decodes wait (vLLM before V1).

A baseline for comparison; kvmesh's own engine has no such mode.
"""

from __future__ import annotations

from kvmesh.engine.iteration import Iteration
from kvmesh.engine.scheduler import Scheduler
from kvmesh.planner.simulator.coarse import CoarseScheduler


class PrefillFirst(Scheduler):
    """An iteration is of prompts only, or of decodes only."""

    def schedule(self) -> Iteration:
        iteration = Iteration()
        self._admit(iteration)
        self._add_rows([sequence for sequence in self.running if sequence.pending > 1], self.token_budget, iteration)
        if not iteration.rows:
            decoding = [sequence for sequence in self.running if sequence.pending == 1]
            self._add_rows(decoding, len(decoding), iteration)
        return iteration


class CoarsePrefillFirst(PrefillFirst, CoarseScheduler):
    """The same over coarse sequences."""


def scheduler_class(literal: bool, prefill_first: bool) -> type[Scheduler]:
    if prefill_first:
        return PrefillFirst if literal else CoarsePrefillFirst
    return Scheduler if literal else CoarseScheduler
