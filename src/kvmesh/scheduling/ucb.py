"""Exploration on top of any policy: PerLLM's constrained upper confidence bounds (arXiv 2405.14636).

An arm is a pair of request class and worker. Hard constraints filter arms; the best of mean reward + delta *
sqrt(ln t / n) is taken, untried arms first. Rewards come when a request has been served, long after the choice, and
drift with load: so only the last `window` rewards count, and a choice counts from the moment it is made. The reward is
the smallest normalised slack to the objectives; without objectives, how much sooner the first token came than usual.
The policy underneath does the charging, and chooses alone where one worker is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, log, sqrt

from kvmesh.scheduling.admission import Refused
from kvmesh.scheduling.base import FleetPolicy
from kvmesh.scheduling.load import Assignment
from kvmesh.scheduling.policy import Ended, Identity, Observation, Prompt, Served, identity
from kvmesh.scheduling.serving_plan import ServingPlan
from kvmesh.types import WorkerInfo

Arm = tuple[int, Identity]
SMOOTHING = 0.05


@dataclass(slots=True)
class Arms:
    """Sliding-window means of delayed rewards. `delta`: how much doubt counts."""

    delta: float = 0.5
    window: int = 1000
    _rewards: deque[tuple[Arm, float]] = field(default_factory=deque)
    _sums: dict[Arm, tuple[int, float]] = field(default_factory=dict)
    _open: dict[Arm, int] = field(default_factory=dict)

    def choose(self, arms: Sequence[Arm]) -> Arm:
        """The highest upper bound; of untried arms the first."""
        total = max(2, sum(self.tried(arm) for arm in arms))
        return max(arms, key=lambda arm: self._bound(arm, total))

    def pull(self, arm: Arm) -> None:
        self._open[arm] = self._open.get(arm, 0) + 1

    def reward(self, arm: Arm, value: float | None) -> None:
        """The arm's request has ended; None: nothing was learnt of it."""
        self._open[arm] = max(0, self._open.get(arm, 0) - 1)
        if value is not None:
            self._rewards.append((arm, value))
            self._add(arm, 1, value)
            if len(self._rewards) > self.window:
                old, gone = self._rewards.popleft()
                self._add(old, -1, -gone)

    def tried(self, arm: Arm) -> int:
        return self._sums.get(arm, (0, 0.0))[0] + self._open.get(arm, 0)

    def mean(self, arm: Arm) -> float:
        count, total = self._sums.get(arm, (0, 0.0))
        return total / count if count else 0.0

    def _bound(self, arm: Arm, total: int) -> float:
        tried = self.tried(arm)
        return self.mean(arm) + self.delta * sqrt(log(total) / tried) if tried else inf

    def _add(self, arm: Arm, count: int, value: float) -> None:
        old_count, old_value = self._sums.get(arm, (0, 0.0))
        self._sums[arm] = (old_count + count, old_value + value)


@dataclass(slots=True)
class Exploring:
    """A policy whose workers the arms choose, among those that keep the constraints; the rest is `inner`'s.

    `expense`: of a request on each worker, such as its energy, in units of the reward.
    """

    inner: FleetPolicy
    arms: Arms = field(default_factory=Arms)
    expense: Mapping[str, float] = field(default_factory=dict)
    _pulled: dict[Hashable, Arm] = field(default_factory=dict)
    _usual_ttft: float = 0.0

    @property
    def assigned(self) -> int:
        return self.inner.assigned

    def admit(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, prefilled: bool = False
    ) -> Refused | None:
        return self.inner.admit(workers, prompt, now, prefilled)

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """Where the chosen arm says; where no arm keeps the constraints, where the policy underneath does."""
        pool = list(workers)
        chosen = self._pull(self.inner.fleet.phases.prefill(pool), prompt, now, avoid)
        if chosen is not None:
            pool = [worker for worker in pool if worker is chosen or not worker.role.prefills]
        return self.inner.prefill(pool, prompt, now, avoid)

    def decode(
        self,
        workers: Iterable[WorkerInfo],
        context: int,
        sequences: int,
        now: float,
        avoid: Collection[Identity] = (),
        *,
        prompt: Prompt | None = None,
        local: bool = False,
    ) -> Assignment | None:
        """As the policy underneath does, but for prompts to be computed there: those follow the arms, too."""
        pool = list(workers)
        if local and prompt is not None:
            chosen = self._pull([worker for worker in pool if worker.role.decodes], prompt, now, avoid)
            pool = pool if chosen is None else [chosen]
        return self.inner.decode(pool, context, sequences, now, avoid, prompt=prompt, local=local)

    def observe(self, observation: Observation) -> None:
        self.inner.observe(observation)
        if isinstance(observation, Served):
            self._learn(observation)
        if isinstance(observation, Ended):
            self._drop(observation.prompt.key)

    def follow(self, plan: ServingPlan) -> None:
        self.inner.follow(plan)

    def suspect(self, worker: WorkerInfo, now: float) -> None:
        self.inner.suspect(worker, now)

    def retain(self, workers: Iterable[WorkerInfo]) -> None:
        self.inner.retain(workers)

    def check_integrity(self) -> list[str]:
        return self.inner.check_integrity()

    def _pull(
        self, pool: Sequence[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity]
    ) -> WorkerInfo | None:
        kind = prompt.tokens.bit_length()
        able = {(kind, identity(worker)): worker for worker in pool if self._allowed(worker, prompt, now, avoid)}
        if not able:
            return None
        arm = self.arms.choose(list(able))
        self._drop(prompt.key)
        if prompt.key is not None:
            self._pulled[prompt.key] = arm
            self.arms.pull(arm)
        return able[arm]

    def _allowed(self, worker: WorkerInfo, prompt: Prompt, now: float, avoid: Collection[Identity]) -> bool:
        """Not failed, with room, and predicted to keep the objective for the first token."""
        fleet = self.inner.fleet
        load = fleet.load(worker)
        if identity(worker) in avoid or load.suspected_until > now or fleet.room(worker) < prompt.tokens:
            return False
        return load.wait(now) + fleet.estimate(worker, prompt).seconds <= prompt.slo.ttft

    def _learn(self, served: Served) -> None:
        self._usual_ttft += SMOOTHING * (served.ttft - self._usual_ttft) if self._usual_ttft else served.ttft
        arm = self._pulled.get(served.prompt.key)
        worker = served.prefill or served.decode
        if arm is not None and worker is not None and identity(worker) == arm[1]:
            del self._pulled[served.prompt.key]
            self.arms.reward(arm, self._slack(served) - self.expense.get(worker.worker_id, 0.0))

    def _slack(self, served: Served) -> float:
        """PerLLM's f(y): the smallest of the normalised slacks, within [-1, 1]."""
        slo = served.prompt.slo
        slacks = [1 - served.ttft / (slo.ttft if slo.ttft < inf else 2 * self._usual_ttft)]
        if slo.tpot < inf:
            slacks.append(1 - served.tpot / slo.tpot)
        return max(-1.0, min(slacks))

    def _drop(self, key: Hashable) -> None:
        """Nothing will be learnt of what this request was given before. Idempotent."""
        if (arm := self._pulled.pop(key, None)) is not None:
            self.arms.reward(arm, None)
