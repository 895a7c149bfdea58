"""Whether a request should be let in at all: early rejection, by the load of now or by the load to come.

A request that will miss an SLO should be refused before its prompt is computed. Gating on the decode load of this
moment makes the two pools swing in antiphase, because what is let in now decodes later; gating on the decode load
predicted for the moment when the prompt will be computed damps that (Mooncake, arXiv 2407.00079, section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Protocol

from kvmesh.scheduling.admission import LONGEST_RETRY, SHORTEST_RETRY, Refused
from kvmesh.scheduling.policy import Prompt
from kvmesh.types import Role, WorkerInfo

if TYPE_CHECKING:
    from kvmesh.scheduling.fleet import Fleet


class Gate(Protocol):
    def check(
        self, fleet: Fleet, workers: Sequence[WorkerInfo], prompt: Prompt, now: float, prefilled: bool
    ) -> Refused | None:
        """See `policy.Policy.admit`."""
        ...


class Open:
    """Lets everyone in."""

    def check(
        self, fleet: Fleet, workers: Sequence[WorkerInfo], prompt: Prompt, now: float, prefilled: bool
    ) -> Refused | None:
        return None


class Late:
    """Each pool looks after itself: the prefill pool on arrival, the decode pool when the prompt is computed."""

    def check(
        self, fleet: Fleet, workers: Sequence[WorkerInfo], prompt: Prompt, now: float, prefilled: bool
    ) -> Refused | None:
        if prefilled:
            return slow_decode(prompt, current_step(fleet, workers, prompt))
        return late_prefill(prompt, earliest(fleet, workers, prompt, now)) if prompt.slo.ttft < inf else None


class CurrentLoad(Late):
    """Early rejection: on arrival the decode pool is asked, too, about this moment."""

    def check(
        self, fleet: Fleet, workers: Sequence[WorkerInfo], prompt: Prompt, now: float, prefilled: bool
    ) -> Refused | None:
        late = Late.check(self, fleet, workers, prompt, now, prefilled)
        return late or slow_decode(prompt, current_step(fleet, workers, prompt))


@dataclass(frozen=True, slots=True)
class PredictedLoad(Late):
    """Early rejection: on arrival the decode pool is asked about the moment when the prompt will be computed.

    At overload the predicted load stands at the limit. `margin`: of what the objective leaves beside the request's own
    step, so much may be used, for the load that comes will be a little more or less.
    """

    margin: float = 0.9

    def check(
        self, fleet: Fleet, workers: Sequence[WorkerInfo], prompt: Prompt, now: float, prefilled: bool
    ) -> Refused | None:
        late = Late.check(self, fleet, workers, prompt, now, prefilled)
        if late or prefilled or prompt.slo.tpot == inf:
            return late
        ttft = earliest(fleet, workers, prompt, now)
        if ttft == inf:
            return None
        alone = predicted_step(fleet, workers, prompt, now, inf)
        step = predicted_step(fleet, workers, prompt, now, now + ttft)
        return slow_decode(prompt, alone + (step - alone) / self.margin)


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """Of all decode workers together at some moment."""

    sequences: float
    context_tokens: float


def earliest(fleet: Fleet, workers: Sequence[WorkerInfo], prompt: Prompt, now: float) -> float:
    """Predicted seconds to the first token on the best worker: infinite without any, 0 if one was never measured."""
    pool = fleet.phases.prefill(workers) or fleet.phases.decode(workers)
    return min((_ttft(fleet, worker, prompt, now) for worker in pool), default=inf)


def _ttft(fleet: Fleet, worker: WorkerInfo, prompt: Prompt, now: float) -> float:
    if not fleet.times(worker).prefill.line.measured:
        return 0.0
    return fleet.load(worker).wait(now) + fleet.estimate(worker, prompt).seconds


def current_step(fleet: Fleet, workers: Sequence[WorkerInfo], prompt: Prompt) -> float:
    """Seconds of a decode step on the least loaded worker, with this request and what decodes there now."""
    loads = [(worker, fleet.load(worker)) for worker in fleet.phases.decode(workers)]
    steps = (_step(fleet, worker, prompt, load.context_tokens, load.sequences) for worker, load in loads)
    return min(steps, default=0.0)


def predicted_step(fleet: Fleet, workers: Sequence[WorkerInfo], prompt: Prompt, now: float, then: float) -> float:
    """Seconds of a decode step at `then`, the load spread evenly; the request alone if `then` is never."""
    pool = fleet.phases.decode(workers)
    if not pool:
        return 0.0
    context = sequences = 0.0
    if then < inf:
        for load in (decode_load(fleet, workers, now, then), overtakers(fleet, workers, now, then)):
            context += load.context_tokens / len(pool)
            sequences += load.sequences / len(pool)
    return sum(_step(fleet, worker, prompt, context, sequences) for worker in pool) / len(pool)


def _step(fleet: Fleet, worker: WorkerInfo, prompt: Prompt, context: float, sequences: float) -> float:
    """Seconds of a step with this request beside so much; 0 if the worker was never measured: it has to be tried."""
    step = fleet.times(worker).step
    return step.predict(context + prompt.tokens, sequences + prompt.samples) if step.line.measured else 0.0


def decode_load(fleet: Fleet, workers: Sequence[WorkerInfo], now: float, then: float) -> DecodeLoad:
    """What decodes now and will not have ended, and what is being prefilled and will have been, and not have ended."""
    sequences = context = 0.0
    for worker in workers:
        load = fleet.load(worker)
        computed = now - (load.prompt_seconds - load.wait(now))
        for one in load.assignments.values():
            computed += one.seconds
            starts = computed if one.decoding_since is None else one.decoding_since
            if starts <= then < starts + fleet.mean_decode_seconds:
                sequences += one.sequences
                context += one.context_tokens if one.phase is Role.DECODE else one.length
    return DecodeLoad(sequences, context)


def overtakers(fleet: Fleet, workers: Sequence[WorkerInfo], now: float, then: float) -> DecodeLoad:
    """Who will come later and decode earlier: a long prompt is overtaken by short ones, at the present pace."""
    pool = fleet.phases.prefill(workers)
    usual = sum(fleet.load(worker).wait(now) for worker in pool) / max(1, len(pool))
    share = min(1.0, max(0.0, then - now - usual) / max(fleet.mean_decode_seconds, 1e-9))
    present = decode_load(fleet, workers, now, now)
    return DecodeLoad(present.sequences * share, present.context_tokens * share)


def late_prefill(prompt: Prompt, ttft: float) -> Refused | None:
    if ttft <= prompt.slo.ttft or ttft == inf:
        return None
    why = f"the first token would come after {ttft:.2g} s, the objective is {prompt.slo.ttft:g} s"
    return Refused(_bounded(ttft - prompt.slo.ttft), why)


def slow_decode(prompt: Prompt, step: float) -> Refused | None:
    if step <= prompt.slo.tpot:
        return None
    why = f"a token would take {step:.2g} s, the objective is {prompt.slo.tpot:g} s"
    return Refused(_bounded(step / prompt.slo.tpot), why)


def _bounded(seconds: float) -> float:
    return min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY)
