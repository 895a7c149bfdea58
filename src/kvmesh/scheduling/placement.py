"""Placement: which worker computes a prompt, and which one generates.

Argmin of an estimated time, ties broken by least recent use. A prefill candidate costs the uncached tokens queued on
it plus those of this request, divided by its measured rate: the TTFT estimate of Mooncake (FAST'25). A decode candidate
costs its active context and sequences, divided by its measured speed. Pure: does not know connections or models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from kvmesh.scheduling.load import Assignment, Load
from kvmesh.scheduling.prefix_index import PrefixIndex
from kvmesh.types import BLOCK_TOKENS, WorkerInfo

Identity = tuple[str, int]
"""(worker_id, epoch): one life of a worker."""

STORED_COST = 0.1
"""Fetching a stored token, relative to computing it."""
SEQUENCE_COST = 256
"""One more running sequence, in tokens of context."""
SUSPICION_SECONDS = 10.0


def identity(worker: WorkerInfo) -> Identity:
    return worker.worker_id, worker.epoch


@dataclass(frozen=True, slots=True)
class Prompt:
    """What placement knows of a request: its length, its block hashes, how many leading tokens the stores have."""

    tokens: int
    hashes: Sequence[int] = ()
    stored_tokens: int = 0


@dataclass(slots=True)
class Placement:
    """The loads of all workers, and the argmin over them."""

    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    _loads: dict[Identity, Load] = field(default_factory=dict)
    _clock: int = 0

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """The worker with the least estimated time to first token, charged with the prompt; None if there is none."""
        pool = list(workers)
        hits = {identity(w): self.prefixes.match(*identity(w), prompt.hashes) * BLOCK_TOKENS for w in pool}
        costs = {key: uncached_cost(prompt, hit) for key, hit in hits.items()}
        chosen = self._cheapest(pool, now, avoid, lambda key, load: load.tokens + costs[key])
        if chosen is None:
            return None
        key = identity(chosen)
        self.prefixes.record(*key, prompt.hashes)
        return self._assign(chosen, costs[key], 1, hits[key])

    def decode(
        self, workers: Iterable[WorkerInfo], context: int, sequences: int, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """The worker with the least load for its speed, charged with `context` tokens in `sequences` samples."""
        chosen = self._cheapest(
            list(workers), now, avoid, lambda _, load: load.tokens + SEQUENCE_COST * (load.sequences + 1)
        )
        return None if chosen is None else self._assign(chosen, float(context), sequences, 0)

    def suspect(self, worker: WorkerInfo, now: float) -> None:
        """The worker failed someone: all avoid it for a while, unless nothing else is left."""
        self._load(identity(worker)).suspected_until = now + SUSPICION_SECONDS

    def retain(self, workers: Iterable[WorkerInfo]) -> None:
        """Forgets workers that are gone or have restarted; the loads of those with assignments out stay till then."""
        alive = {identity(worker) for worker in workers}
        names = {worker_id for worker_id, _ in alive}
        for key in [key for key, load in self._loads.items() if key not in alive and not load.assignments]:
            del self._loads[key]
            if key[0] not in names:
                self.prefixes.forget(key[0])

    @property
    def assigned(self) -> int:
        """Assignments that are out."""
        return sum(len(load.assignments) for load in self._loads.values())

    def check_integrity(self) -> list[str]:
        """Counters that are wrong; empty is good."""
        return [f"{key[0]} has {problem}" for key, load in self._loads.items() for problem in load.problems()]

    def _cheapest(
        self,
        pool: Sequence[WorkerInfo],
        now: float,
        avoid: Collection[Identity],
        work: Callable[[Identity, Load], float],
    ) -> WorkerInfo | None:
        """Unsuspected before suspected before those to avoid; among equals the least work for its rate."""
        usual = self._usual_rate(pool)

        def rank(worker: WorkerInfo) -> tuple[bool, bool, float, int]:
            key, load = identity(worker), self._load(identity(worker))
            return key in avoid, load.suspected_until > now, work(key, load) / (load.rate or usual), load.last_used

        return min(pool, key=rank, default=None)

    def _usual_rate(self, pool: Sequence[WorkerInfo]) -> float:
        """What to expect of a worker not yet measured: the mean of those that are."""
        rates = [rate for worker in pool if (rate := self._load(identity(worker)).rate)]
        return sum(rates) / len(rates) if rates else 1.0

    def _assign(self, worker: WorkerInfo, tokens: float, sequences: int, hit_tokens: int) -> Assignment:
        self._clock += 1
        return Assignment(worker, self._load(identity(worker)), self._clock, tokens, sequences, hit_tokens)

    def _load(self, key: Identity) -> Load:
        return self._loads.setdefault(key, Load())


def uncached_cost(prompt: Prompt, hit_tokens: int) -> float:
    """Tokens to compute, and at a fraction of their cost those to fetch; the last token is always computed."""
    hit = min(hit_tokens, prompt.tokens - 1)
    stored = max(min(prompt.stored_tokens, prompt.tokens - 1) - hit, 0)
    return prompt.tokens - hit - stored * (1 - STORED_COST)
