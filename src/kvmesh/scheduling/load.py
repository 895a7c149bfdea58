"""What the router has given each worker and not yet had back.

Counters change at dispatch, first token and completion, never by polling, so they are exact the moment they are read.
Pure; knows no policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, inf, isfinite

from kvmesh.types import Role, WorkerInfo

SMOOTHING = 0.2
"""Weight of the newest measurement in a worker's running mean rate."""
SHARE_SECONDS = 10.0
"""How long a worker's past work counts as its present business."""
TOLERANCE = 1e-6
"""Sums of floats that should be zero."""


@dataclass(slots=True)
class Load:
    """One life of one worker.

    `prompt_tokens` and `prompt_seconds` are still to be computed, the latter as predicted; `context_tokens` and
    `sequences` are being decoded. `rates`, once measured: of PREFILL, computed tokens per second; of DECODE, tokens per
    second of one sequence.
    """

    prompt_tokens: float = 0.0
    prompt_seconds: float = 0.0
    context_tokens: float = 0.0
    sequences: int = 0
    rates: dict[Role, float] = field(default_factory=dict)
    last_used: int = 0
    suspected_until: float = 0.0
    progress_since: float = 0.0
    """When the prompt at the head of the queue was begun, as far as is known."""
    share: float = 0.0
    """Of its time that the worker lately spent on prompts, at `share_at`; fades over SHARE_SECONDS."""
    share_at: float = 0.0
    taken: float = 0.0
    """Seconds of prompt work ever given to the worker."""
    assignments: dict[int, Assignment] = field(default_factory=dict)

    def wait(self, now: float) -> float:
        """Predicted seconds until a prompt that comes now would be begun, first come first served."""
        head = next((one.seconds for one in self.assignments.values() if one.prompt_tokens), 0.0)
        return max(0.0, self.prompt_seconds - min(max(0.0, now - self.progress_since), head))

    def busy(self, now: float) -> float:
        """Share of the worker's time that goes to prompts, lately and with what it has been given; 0 to 1."""
        faded = self.share * exp(min(0.0, self.share_at - now) / SHARE_SECONDS)
        return min(1.0, faded)

    def take_on(self, seconds: float, now: float) -> None:
        """Notes that so much more prompt work was given to the worker."""
        faded = self.share * exp(min(0.0, self.share_at - now) / SHARE_SECONDS)
        self.share, self.share_at = faded + seconds / SHARE_SECONDS, now
        self.taken += seconds

    def observe(self, phase: Role, rate: float) -> None:
        """Moves the running mean of the phase towards a new measurement."""
        if isfinite(rate) and rate > 0:
            mean = self.rates.setdefault(phase, rate)
            self.rates[phase] = mean + SMOOTHING * (rate - mean)

    def settle(self) -> None:
        """Ends the drift of sums whenever nothing is out."""
        if not self.assignments:
            self.prompt_tokens = self.prompt_seconds = self.context_tokens = 0.0

    def problems(self) -> list[str]:
        """Each counter must be the sum over the assignments that are out."""
        out = self.assignments.values()
        sums = {
            "prompt tokens": (self.prompt_tokens, sum(one.prompt_tokens for one in out)),
            "prompt seconds": (self.prompt_seconds, sum(one.seconds for one in out)),
            "context tokens": (self.context_tokens, sum(one.context_tokens for one in out)),
            "sequences": (self.sequences, sum(one.sequences for one in out)),
        }
        return [
            f"{count:g} {name}, {total:g} in {len(out)} assignments"
            for name, (count, total) in sums.items()
            if abs(count - total) > TOLERANCE * max(1.0, abs(total)) or count < -TOLERANCE
        ]


@dataclass(slots=True, eq=False)
class Assignment:
    """One request's share of a worker's load, from dispatch on. Whoever holds it must call `finish`.

    `phase` is PREFILL or DECODE; a DECODE assignment with `prompt_tokens` computes the prompt, too.
    """

    worker: WorkerInfo
    load: Load
    number: int
    phase: Role
    began: float
    prompt_tokens: float = 0.0
    seconds: float = 0.0
    context_tokens: float = 0.0
    sequences: int = 0
    length: int = 0
    """Tokens of the whole prompt; 0 if not known."""
    hit_tokens: int = 0
    """Prompt tokens whose KV the worker probably has."""
    slo_tpot: float = inf
    decoding_since: float | None = None
    undisturbed: float = 0.0
    """The worker's `taken` less what was still queued, when the decoding began."""

    def __post_init__(self) -> None:
        load = self.load
        if load.prompt_tokens <= TOLERANCE:
            load.progress_since = self.began
        if self.seconds:
            load.take_on(self.seconds, self.began)
        load.assignments[self.number] = self
        load.prompt_tokens += self.prompt_tokens
        load.prompt_seconds += self.seconds
        load.context_tokens += self.context_tokens
        load.sequences += self.sequences
        load.last_used = self.number
        if self.phase is Role.DECODE and not self.prompt_tokens:
            self._begin_decoding(self.began)

    def first_token(self, now: float) -> None:
        """The prompt is computed: nothing of it is queued any more. Idempotent."""
        if self.prompt_tokens:
            self.load.prompt_tokens -= self.prompt_tokens
            self.load.prompt_seconds -= self.seconds
            self.load.progress_since = now
            self.prompt_tokens = self.seconds = 0.0
            if self.phase is Role.DECODE:
                self._begin_decoding(now)

    @property
    def disturbance(self) -> float:
        """Seconds of prompt work on its worker, done and queued, that fall into its decoding."""
        return self.load.taken - self.undisturbed

    @property
    def disturbed(self) -> float:
        """The part of it that is done."""
        return max(0.0, self.disturbance - self.load.prompt_seconds)

    def _begin_decoding(self, now: float) -> None:
        self.decoding_since = now
        self.undisturbed = self.load.taken - self.load.prompt_seconds

    def finish(self, now: float, rate: float = 0.0) -> None:
        """Gives back all that is left; `rate` is what was measured, if anything. Idempotent."""
        if self.number not in self.load.assignments:
            return
        self.load.observe(self.phase, rate)
        self.first_token(now)
        self.load.context_tokens -= self.context_tokens
        self.load.sequences -= self.sequences
        del self.load.assignments[self.number]
        self.load.settle()
