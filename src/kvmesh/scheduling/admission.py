"""Admission: how many requests run at once, how many may wait, and who is next.

First come, first served. A request that cannot start before its deadline is not kept; one too many is refused with an
estimate of when to come back. Pure: state in, decisions out. Does not know what a request is, nor who waits how.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

SMOOTHING = 0.2
"""Weight of the newest interval in the running mean of the time between completions."""
SHORTEST_RETRY, LONGEST_RETRY = 0.1, 60.0


@dataclass(frozen=True, slots=True)
class Admitted:
    """May start now."""


@dataclass(frozen=True, slots=True)
class Queued:
    """Waits; `ahead` requests come first."""

    ahead: int


@dataclass(frozen=True, slots=True)
class Refused:
    """No room; `retry_after` in seconds is an estimate, `why` one clause, or empty."""

    retry_after: float
    why: str = ""


Decision = Admitted | Queued | Refused


@dataclass(slots=True)
class Admission:
    """At most `max_running` requests run and `max_queued` wait. All times are in seconds of one monotonic clock."""

    max_running: int
    max_queued: int
    _limit: int | None = None
    _low_limit: int | None = None
    _running: set[Hashable] = field(default_factory=set)
    _queue: OrderedDict[Hashable, float] = field(default_factory=OrderedDict)
    _interval: float | None = None
    _last_completion: float | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def limit(self) -> int:
        """How many may run now."""
        return self.max_running if self._limit is None else min(self._limit, self.max_running)

    def narrow(self, limit: int | None, low_limit: int | None, now: float) -> list[Hashable]:
        """From now on no more than `limit` may run, and no low-priority request may start beside `low_limit` others;
        what runs goes on. None: as many as ever. Returns those that may start now."""
        self._limit, self._low_limit = limit, low_limit
        return self._promote(now)

    def submit(self, key: Hashable, now: float, deadline: float, low_priority: bool = False) -> Decision:
        """Decides about a new request; `key` must not be known yet."""
        assert key not in self._running | self._queue.keys(), f"{key!r} is known already"
        if low_priority and self._low_limit is not None and len(self._running) >= self._low_limit:
            return Refused(self._retry_after(), "requests of low priority wait until there is power again")
        if len(self._running) < self.limit and not self._queue:
            self._running.add(key)
            return Admitted()
        if len(self._queue) >= self.max_queued or now + self._expected_wait(len(self._queue)) >= deadline:
            return Refused(self._retry_after())
        self._queue[key] = deadline
        return Queued(len(self._queue) - 1)

    def finish(self, key: Hashable, now: float) -> list[Hashable]:
        """Forgets a request wherever it is (idempotent); returns those that may start now."""
        self._queue.pop(key, None)
        if key in self._running:
            self._observe_completion(now)
            self._running.remove(key)
        return self._promote(now)

    def _promote(self, now: float) -> list[Hashable]:
        promoted: list[Hashable] = []
        while self._queue and len(self._running) < self.limit:
            key, deadline = self._queue.popitem(last=False)
            if deadline > now:
                self._running.add(key)
                promoted.append(key)
        return promoted

    def _observe_completion(self, now: float) -> None:
        """Only between completions under full load: idle time says nothing about throughput."""
        if len(self._running) < self.limit:
            self._last_completion = None
            return
        if self._last_completion is not None:
            seen = now - self._last_completion
            self._interval = seen if self._interval is None else self._interval + SMOOTHING * (seen - self._interval)
        self._last_completion = now

    def _expected_wait(self, ahead: int) -> float:
        return 0.0 if self._interval is None else (ahead + 1) * self._interval

    def _retry_after(self) -> float:
        wait = self._expected_wait(len(self._queue)) or 1.0
        return min(max(wait, SHORTEST_RETRY), LONGEST_RETRY)

    def check_integrity(self) -> list[str]:
        """What is wrong with the counters; empty is good."""
        problems = []
        if len(self._running) > self.max_running:
            problems.append(f"{len(self._running)} requests run, {self.max_running} may")
        if len(self._queue) > self.max_queued:
            problems.append(f"{len(self._queue)} requests wait, {self.max_queued} may")
        if self._queue and len(self._running) < self.limit:
            problems.append(f"{len(self._queue)} requests wait although {len(self._running)} run")
        return problems + [f"{key!r} both runs and waits" for key in self._running & self._queue.keys()]
