"""The one interface of request scheduling: what the router asks, and what the simulator asks of the same objects.

A policy is told of a request three times (`admit`, `prefill`, `decode`), charges the chosen workers by `Assignment`s,
and learns from what `observe` brings. It takes state and returns decisions; it neither waits nor calls anyone. All
times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from kvmesh.scheduling.admission import Refused
from kvmesh.scheduling.load import Assignment
from kvmesh.scheduling.serving_plan import ServingPlan
from kvmesh.types import WorkerInfo

Identity = tuple[str, int]
"""(worker_id, epoch): one life of a worker."""


def identity(worker: WorkerInfo) -> Identity:
    return worker.worker_id, worker.epoch


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds to the first token, and for each token after it, that a request should not exceed."""

    ttft: float = inf
    tpot: float = inf


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy knows of a request: length, block hashes, how many leading tokens the stores have.

    `key` tells requests apart; `output_tokens` is the most that each of `samples` may get (0: unknown).
    """

    tokens: int
    hashes: Sequence[int] = ()
    stored_tokens: int = 0
    key: Hashable = None
    output_tokens: int = 0
    samples: int = 1
    slo: Slo = Slo()


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt was computed: `computed_tokens` after `cached_tokens` that were there, in `seconds` of computing."""

    worker: WorkerInfo
    computed_tokens: int
    cached_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Decoded:
    """A sequence gained `tokens` at `seconds` each, beside a mean of `batch` sequences with `context_tokens` in all.

    `disturbed`: seconds of the whole that the worker probably spent on prompts.
    """

    worker: WorkerInfo
    tokens: int
    seconds: float
    batch: float
    context_tokens: float
    disturbed: float = 0.0


@dataclass(frozen=True, slots=True)
class Transferred:
    """KV of `tokens` came to the worker in `seconds`."""

    worker: WorkerInfo
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Served:
    """A request got its tokens: `prefill` computed the prompt (None: `decode` did), `decode` generated."""

    prompt: Prompt
    prefill: WorkerInfo | None
    decode: WorkerInfo | None
    ttft: float
    tpot: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over, however it ended: what is remembered of it may go."""

    prompt: Prompt


Observation = Prefilled | Decoded | Transferred | Served | Ended


class Policy(Protocol):
    """`workers`: all that may serve the request, of any role; a policy takes those that fit the phase.

    `avoid`: those that have failed this request; one of them is chosen only if there is nobody else.
    """

    @property
    def assigned(self) -> int:
        """Assignments that are out."""
        ...

    def admit(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, prefilled: bool = False
    ) -> Refused | None:
        """Whether to take the request; `prefilled`: its prompt is computed, and refusing now would waste that."""
        ...

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """Who computes the prompt; None: the decode worker does, in chunks beside what it decodes."""
        ...

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
        """Who generates: `context` tokens in `sequences` samples, None if nobody can.

        `prompt` is the request's, if at hand; `local`: the chosen worker has to compute it first.
        """
        ...

    def follow(self, plan: ServingPlan) -> None:
        """From now on workers have the phases of this plan, and its weights where the policy uses them."""
        ...

    def observe(self, observation: Observation) -> None:
        """Takes in a measurement."""
        ...

    def suspect(self, worker: WorkerInfo, now: float) -> None:
        """The worker failed someone: all avoid it for a while, unless nothing else is left."""
        ...

    def retain(self, workers: Iterable[WorkerInfo]) -> None:
        """Forgets workers that are gone or have restarted; loads with assignments out stay till those end."""
        ...

    def check_integrity(self) -> list[str]:
        """Counters that are wrong; empty is good."""
        ...
