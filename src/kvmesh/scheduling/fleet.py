"""What every policy stands on: the loads, prefixes and speeds of all workers, and the argmin over some of them.

Pure; does not know connections or models, and prefers nobody: the cost is the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from kvmesh.scheduling.load import Assignment, Load
from kvmesh.scheduling.phases import Phases
from kvmesh.scheduling.policy import (
    Decoded,
    Identity,
    Observation,
    Prefilled,
    Prompt,
    Transferred,
    identity,
)
from kvmesh.scheduling.predictor import Profile, Times
from kvmesh.scheduling.prefix_index import PrefixIndex
from kvmesh.types import Role, WorkerInfo

SUSPICION_SECONDS = 10.0
SMOOTHING = 0.02
"""Weight of the newest request in the running means over all requests."""
LEAST_STEP = 0.2
"""Of the measured time per token, what a step took at least, however much time is said to have gone to prompts."""
Cost = Callable[[WorkerInfo, Load], Any]
"""What can be compared: a number, or a tuple of them."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A prompt on a worker: tokens it has, tokens it computes, and the seconds that takes, fetching included."""

    hit: int
    tokens: int
    seconds: float


@dataclass(slots=True)
class Fleet:
    """`profiles`: measured speeds by worker id; `usual` holds for the others until they are measured."""

    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    phases: Phases = field(default_factory=Phases)
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    usual: Profile = field(default_factory=Profile)
    mean_output: float = 256.0
    """Tokens that a request gets, lately."""
    mean_decode_seconds: float = 10.0
    """That a request spends decoding, lately."""
    _loads: dict[Identity, Load] = field(default_factory=dict)
    _times: dict[Identity, Times] = field(default_factory=dict)
    _clock: int = 0

    # What is known of a worker -----------------------------------------------------------------------------------

    def load(self, worker: WorkerInfo) -> Load:
        return self._loads.setdefault(identity(worker), Load())

    def times(self, worker: WorkerInfo) -> Times:
        """The worker's own models; before the first measurement those of its profile, or of the best known other."""
        key = identity(worker)
        if (times := self._times.get(key)) is None:
            times = self._times[key] = Times.of(self.profiles.get(worker.worker_id) or self._expected())
        return times

    def _expected(self) -> Profile:
        """Of a worker that was never measured: what the others are like, if nothing better is known."""
        known = max(self._times.values(), key=lambda other: other.measured, default=None)
        return self.usual if self.usual.measured or known is None or not known.measured else known.profile()

    def hit(self, worker: WorkerInfo, prompt: Prompt) -> int:
        """Leading tokens of the prompt whose KV the worker probably has; the last one is always computed."""
        matched = self.prefixes.match(*identity(worker), prompt.hashes) * self.prefixes.block_tokens
        return min(matched, prompt.tokens - 1)

    def estimate(self, worker: WorkerInfo, prompt: Prompt) -> Estimate:
        """A prefix that the stores have is fetched only where that beats computing it (Mooncake, FAST'25)."""
        times, hit = self.times(worker), self.hit(worker, prompt)
        best = Estimate(hit, prompt.tokens - hit, times.prefill.predict(prompt.tokens - hit, hit))
        stored = min(prompt.stored_tokens, prompt.tokens - 1)
        if stored > hit:
            seconds = times.transfer.predict((1.0, stored - hit)) + times.prefill.predict(
                prompt.tokens - stored, stored
            )
            best = min(best, Estimate(hit, prompt.tokens - stored, seconds), key=lambda one: one.seconds)
        return best

    def room(self, worker: WorkerInfo) -> float:
        """Tokens of KV that would fit beside what decodes, half-grown; unlimited if the worker does not say."""
        capacity, load = worker.capacity.blocks * worker.capacity.block_tokens, self.load(worker)
        return capacity - load.context_tokens - load.sequences * self.mean_output / 2 if capacity else inf

    def fullness(self, worker: WorkerInfo, tokens: int) -> float:
        """Share of its KV memory that is in use with so many tokens more; 0 if the worker does not say."""
        capacity = worker.capacity.blocks * worker.capacity.block_tokens
        return max(0.0, 1.0 - (self.room(worker) - tokens) / capacity) if capacity else 0.0

    def step_seconds(self, worker: WorkerInfo, context: float, sequences: int, now: float) -> float:
        """Predicted time per token there with so much more load, prompts computed between the steps included."""
        load = self.load(worker)
        step = self.times(worker).step.predict(load.context_tokens + context, load.sequences + sequences)
        return step / max(0.05, 1.0 - load.busy(now))

    # Choosing and charging ---------------------------------------------------------------------------------------

    def cheapest(
        self, pool: Sequence[WorkerInfo], now: float, avoid: Collection[Identity], cost: Cost
    ) -> WorkerInfo | None:
        """Unsuspected before suspected before those to avoid; of equals the cheapest, then the least recently used."""

        def rank(worker: WorkerInfo) -> tuple[bool, bool, Any, int]:
            load = self.load(worker)
            return identity(worker) in avoid, load.suspected_until > now, cost(worker, load), load.last_used

        return min(pool, key=rank, default=None)

    def charge_prefill(
        self, worker: WorkerInfo, prompt: Prompt, now: float, tokens: float, seconds: float, hit: int = 0
    ) -> Assignment:
        """The worker is about to compute `tokens` of the prompt, and will have its KV."""
        self.prefixes.record(*identity(worker), prompt.hashes)
        return self._assign(
            worker, Role.PREFILL, now,
            prompt_tokens=tokens, seconds=seconds, sequences=1, hit_tokens=hit, length=prompt.tokens,
        )  # fmt: skip

    def charge_decode(
        self,
        worker: WorkerInfo,
        context: int,
        sequences: int,
        now: float,
        prompt: Prompt | None = None,
        local: bool = False,
    ) -> Assignment:
        """The worker is about to decode; `local`: after computing what it lacks of the prompt."""
        charge: dict[str, float] = {"context_tokens": float(context), "sequences": sequences}
        if prompt is not None:
            if local:
                work = self.estimate(worker, prompt)
                charge |= {"prompt_tokens": work.tokens, "seconds": work.seconds, "hit_tokens": work.hit}
            charge |= {"length": prompt.tokens, "slo_tpot": prompt.slo.tpot}
            self.prefixes.record(*identity(worker), prompt.hashes)
        return self._assign(worker, Role.DECODE, now, **charge)

    def _assign(self, worker: WorkerInfo, phase: Role, now: float, **charge: float) -> Assignment:
        self._clock += 1
        return Assignment(worker, self.load(worker), self._clock, phase, now, **charge)  # type: ignore[arg-type]

    # Learning and forgetting -------------------------------------------------------------------------------------

    def observe(self, observation: Observation) -> None:
        """Refines the models of the worker that was measured."""
        match observation:
            case Prefilled(worker, computed, cached, seconds):
                self.times(worker).prefill.observe(computed, cached, seconds)
            case Decoded(worker, tokens, seconds, batch, context, disturbed):
                step = max(LEAST_STEP * seconds, seconds - disturbed / max(1, tokens))
                self.times(worker).step.observe(context, batch, step)
                self.mean_output += SMOOTHING * (tokens + 1 - self.mean_output)
                self.mean_decode_seconds += SMOOTHING * (tokens * seconds - self.mean_decode_seconds)
            case Transferred(worker, tokens, seconds) if tokens:
                self.times(worker).transfer.observe((1.0, tokens), seconds)
            case _:
                pass

    def suspect(self, worker: WorkerInfo, now: float) -> None:
        self.load(worker).suspected_until = now + SUSPICION_SECONDS

    def retain(self, workers: Iterable[WorkerInfo]) -> None:
        alive = {identity(worker) for worker in workers}
        names = {worker_id for worker_id, _ in alive}
        for key in [key for key, load in self._loads.items() if key not in alive and not load.assignments]:
            del self._loads[key]
            self._times.pop(key, None)
            if key[0] not in names:
                self.prefixes.forget(key[0])

    @property
    def assigned(self) -> int:
        return sum(len(load.assignments) for load in self._loads.values())

    def check_integrity(self) -> list[str]:
        return [f"{key[0]} has {problem}" for key, load in self._loads.items() for problem in load.problems()]
