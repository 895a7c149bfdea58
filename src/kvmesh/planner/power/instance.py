"""One model instance, replayed iteration by iteration: its queue, its batch, and the joules of both.

It computes waiting prompts first (at most 2,048 tokens at once, Splitwise's limit), then a step for all its sequences.
Runs of equal steps are taken at once, so cost grows with requests and readings, not with tokens. Knows no other
instance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil, inf

from kvmesh.planner.power.profile import FULL, PowerProfile, Setting
from kvmesh.planner.world import Phase

PROMPT_TOKENS = 2048
"""In one prompt batch."""
TRANSFER_SECONDS = 0.008
"""What of a KV transfer shows, layers being sent while later ones are computed (Splitwise, A100)."""


@dataclass(slots=True)
class Request:
    """Tokens and seconds; `first` and `end` are NaN until known."""

    arrival: float
    prompt: int
    output: int
    low_priority: bool = False
    first: float = float("nan")
    end: float = float("nan")

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

    @property
    def tpot(self) -> float:
        return (self.end - self.first) / max(1, self.output - 1)

    def meets(self, ttft: float, tpot: float) -> bool:
        """False, too, if it never ended."""
        return self.ttft <= ttft and self.tpot <= tpot


@dataclass(slots=True)
class Instance:
    """One model instance. `now` is where it stands: it may be past the time it was advanced to by one iteration."""

    profile: PowerProfile
    low_priority: bool = False
    phase: Phase = Phase.MIXED
    max_batch: int = 64
    asleep_watts: float = 0.0
    setting: Setting = FULL
    on: bool = True
    """Takes requests."""
    awake: bool = True
    """Draws idle watts, whether it takes requests or not."""
    now: float = 0.0
    joules: float = 0.0
    pending: int = 0
    """Tokens that are still to be computed."""
    _watts: float = 0.0
    _steps: int = 0
    _prompts: deque[Request] = field(default_factory=deque)
    _running: list[tuple[int, int, Request]] = field(default_factory=list)
    """(step after which it ends, number, request), a heap."""
    _coming: list[tuple[float, int, Request]] = field(default_factory=list)
    """(when its KV is here, number, request), a heap."""
    _number: int = 0
    hand_over: Callable[[Request, float], None] | None = None
    """Where requests go whose prompts are done, if this instance does not decode."""

    @property
    def requests(self) -> int:
        return len(self._prompts) + len(self._running) + len(self._coming)

    def submit(self, request: Request) -> None:
        self.pending += request.prompt + request.output
        self._prompts.append(request)

    def receive(self, request: Request, ready: float) -> None:
        """A request whose KV is here at `ready`."""
        self.pending += request.output - 1
        self._number += 1
        heappush(self._coming, (ready, self._number, request))

    def advance(self, until: float) -> None:
        """Works, or idles, to `until`."""
        while self.now < until:
            self._join()
            if self._prompts and len(self._running) < self.max_batch:
                self._prefill()
            elif self._running:
                self._decode(min(until, self._next_coming()))
            else:
                pause = min(until, self._next_coming()) - self.now
                self._spend(pause, self.profile.idle_watts if self.awake else self.asleep_watts)

    def _next_coming(self) -> float:
        """When the batch may grow next."""
        return self._coming[0][0] if self._coming and len(self._running) < self.max_batch else inf

    def _join(self) -> None:
        while self._next_coming() <= self.now:
            _, number, request = heappop(self._coming)
            heappush(self._running, (self._steps + request.output - 1, number, request))
        self._finish()

    def joules_at(self, time: float) -> float:
        """Spent by `time`, which is at most one iteration ago."""
        return self.joules - max(0.0, self.now - time) * self._watts

    def _prefill(self) -> None:
        batch: list[Request] = []
        tokens = 0
        while self._prompts and len(self._running) + len(batch) < self.max_batch:
            if batch and tokens + self._prompts[0].prompt > PROMPT_TOKENS:
                break
            request = self._prompts.popleft()
            batch.append(request)
            tokens += request.prompt
        profile, setting = self.profile, self.setting
        self._spend(profile.prefill_seconds(tokens, setting), profile.prefill_watts(tokens, setting))
        for request in batch:
            self._begin(request)

    def _begin(self, request: Request) -> None:
        """The prompt is done, and gave the first token."""
        request.first = self.now
        if self.hand_over and not self.phase.decodes:
            self.pending -= request.prompt + request.output
            self.hand_over(request, self.now + TRANSFER_SECONDS)
            return
        self.pending -= request.prompt + 1
        self._number += 1
        heappush(self._running, (self._steps + request.output - 1, self._number, request))
        self._finish()

    def _decode(self, until: float) -> None:
        """Steps of one batch, until a sequence ends or `until` is reached."""
        batch = len(self._running)
        seconds = self.profile.decode_seconds(batch, self.setting)
        steps = min(self._running[0][0] - self._steps, max(1, ceil((until - self.now) / seconds)))
        self._steps += steps
        self.pending -= steps * batch
        self._spend(steps * seconds, self.profile.decode_watts(batch, self.setting))
        self._finish()

    def _finish(self) -> None:
        while self._running and self._running[0][0] <= self._steps:
            heappop(self._running)[2].end = self.now

    def _spend(self, seconds: float, watts: float) -> None:
        self.now += seconds
        self.joules += seconds * watts
        self._watts = watts
