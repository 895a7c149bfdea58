"""Disaggregated where that pays, colocated where it is cheaper: decided request by request.

A decode worker computes a prompt itself when the first token is predicted to come sooner in proportion to what that
costs those who decode there: the time it takes must fit into each one's remaining budget of time per token. Likewise
workers that can do both decode beside their prompts when the decode workers cannot keep the objective. At a loose
objective this becomes chunked colocation, at a tight one disaggregation (compare TaiChi, arXiv 2508.01989).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from kvmesh.scheduling.base import FleetPolicy
from kvmesh.scheduling.fleet import Estimate
from kvmesh.scheduling.load import Assignment, Load
from kvmesh.scheduling.policy import Identity, Prompt, Slo, identity
from kvmesh.types import WorkerInfo

BESIDE_PROMPTS = 0.7
"""Share of the objective per token that must suffice on a worker that mainly computes prompts: those come in bursts."""
AIM = 0.97
"""Share of the objective per token up to which prompts may slow decodes down: what is predicted is a little wrong."""
CROWDING = 2.0
"""What the last of a worker's KV memory costs, in shares of an objective: whoever finds no room waits."""
LOST = 1.5
"""Times the objective per token from which a request is given up."""


@dataclass(frozen=True, slots=True)
class Option:
    """A place for a prompt: when its first token would come, and which share of somebody's budget it would use.

    `decode`: what generating costs afterwards, there or at the best decode worker, in shares of the objective.
    """

    worker: WorkerInfo
    local: bool
    work: Estimate
    ttft: float
    harm: float
    decode: float

    def cost(self, slo: Slo) -> tuple[bool, float]:
        """Harmless first; then shares of the objectives, or plain seconds if there is none for the first token."""
        first = self.ttft / slo.ttft if slo.ttft < inf else self.ttft
        return self.harm > 1.0, first + min(self.harm, 1.0) + self.decode


@dataclass(slots=True)
class Hybrid(FleetPolicy):
    """See `policy.Policy`. `caution`: expected output of a running request, in units of the usual one."""

    caution: float = 0.5

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """None where the decode worker that `decode` will choose had better compute the prompt itself."""
        fleet, pool = self.fleet, list(workers)
        local = self._local(pool, prompt, now)
        # Who does both computes only what it decodes: KV in two places would cost twice the room.
        apart = [worker for worker in fleet.phases.prefill(pool) if not fleet.phases.of(worker).decodes]
        decode = min((option.decode for option in local), default=0.0)
        remote = [self._apart(worker, prompt, now, decode) for worker in apart]
        best = self._best([*remote, *local], prompt, now, avoid)
        if best is None or best.local:
            return None
        return fleet.charge_prefill(best.worker, prompt, now, best.work.tokens, best.work.seconds, best.work.hit)

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
        """The same choice for a local prompt; for one that is computed, who keeps the objective with least context."""
        fleet, pool = self.fleet, list(workers)
        if local and prompt is not None:
            best = self._best(self._local(pool, prompt, now), prompt, now, avoid)
            return fleet.charge_decode(best.worker, context, sequences, now, prompt, local=True) if best else None
        chosen = fleet.cheapest(
            [worker for worker in pool if worker.role.decodes],
            now,
            avoid,
            lambda worker, load: self._decode_cost(worker, load, context, sequences, prompt, now),
        )
        return None if chosen is None else fleet.charge_decode(chosen, context, sequences, now, prompt)

    def _best(
        self, options: Sequence[Option], prompt: Prompt, now: float, avoid: Collection[Identity]
    ) -> Option | None:
        def rank(option: Option) -> tuple[bool, bool, tuple[bool, float], int]:
            load = self.fleet.load(option.worker)
            failed = identity(option.worker) in avoid
            return failed, load.suspected_until > now, option.cost(prompt.slo), load.last_used

        return min(options, key=rank, default=None)

    def _local(self, workers: Sequence[WorkerInfo], prompt: Prompt, now: float) -> list[Option]:
        """Each decode worker, for its own prompt."""
        return [self._beside_decodes(worker, prompt, now) for worker in self.fleet.phases.decode(workers)]

    def _beside_decodes(self, worker: WorkerInfo, prompt: Prompt, now: float) -> Option:
        fleet, load, tpot = self.fleet, self.fleet.load(worker), prompt.slo.tpot
        work, full = fleet.estimate(worker, prompt), fleet.fullness(worker, prompt.tokens)
        step = fleet.times(worker).step.predict(load.context_tokens + prompt.tokens, load.sequences + prompt.samples)
        ttft = load.wait(now) + work.seconds + step + max(0.0, full - 1.0) * fleet.mean_decode_seconds
        spoilt = full > 1.0 or step > AIM * tpot
        harm = inf if spoilt else self._harm(worker, load, work.seconds, now)
        decode = fleet.step_seconds(worker, prompt.tokens, prompt.samples, now) / tpot + CROWDING * full
        return Option(worker, True, work, ttft, harm, decode)

    def _apart(self, worker: WorkerInfo, prompt: Prompt, now: float, decode: float) -> Option:
        load, work = self.fleet.load(worker), self.fleet.estimate(worker, prompt)
        harm = self._harm(worker, load, work.seconds, now)
        return Option(worker, False, work, load.wait(now) + work.seconds, harm, decode)

    def _harm(self, worker: WorkerInfo, load: Load, seconds: float, now: float) -> float:
        """The largest share of a running request's remaining budget that `seconds` of prompt work would use."""
        if not load.context_tokens:
            return 0.0
        step = self.fleet.times(worker).step.predict(load.context_tokens, load.sequences)
        usual = self.caution * self.fleet.mean_output
        return max((_share(one, seconds, step, usual, now) for one in load.assignments.values()), default=0.0)

    def _decode_cost(
        self, worker: WorkerInfo, load: Load, context: int, sequences: int, prompt: Prompt | None, now: float
    ) -> tuple[bool, bool, float]:
        """Objective kept and room for the KV first, then decode workers by phase, then the least context or step."""
        fleet = self.fleet
        step = fleet.step_seconds(worker, context, sequences, now)
        tpot = prompt.slo.tpot if prompt else inf
        usual = fleet.phases.of(worker).decodes
        good = step <= (tpot if usual else BESIDE_PROMPTS * tpot) and fleet.room(worker) >= context
        return not good, not usual, load.context_tokens if good and tpot < inf else step


def _share(one: Assignment, seconds: float, step: float, usual: float, now: float) -> float:
    """Of one running request; who is lost already cannot be harmed any more."""
    if one.decoding_since is None or one.slo_tpot == inf:
        return 0.0
    tokens = max(usual, (now - one.decoding_since - one.disturbance) / max(step, 1e-9))
    budget = tokens * (AIM * one.slo_tpot - step) - one.disturbance
    if budget > 0:
        return seconds / budget
    return 0.0 if step + one.disturbance / tokens > LOST * one.slo_tpot else inf
