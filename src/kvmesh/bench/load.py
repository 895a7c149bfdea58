"""Sends a workload, open loop: a request goes out when it is due, whatever became of those before.

Knows the clock; what is under load is `targets`, what the figures mean `statistics`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from kvmesh.bench.prompts import synthesise
from kvmesh.bench.statistics import OK, Record
from kvmesh.bench.targets import Target
from kvmesh.bench.workload import Arrival
from kvmesh.errors import DeadlineExceeded, KvmeshError

START_DELAY = 0.1
"""Seconds before the first arrival, so that building its prompt does not make it late."""


@dataclass(slots=True)
class Tally:
    """The run so far, for whoever shows progress."""

    total: int
    sent: int = 0
    tokens: int = 0
    records: list[Record] = field(default_factory=list)

    @property
    def running(self) -> int:
        return self.sent - len(self.records)


@dataclass(slots=True)
class _Observed:
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    cached_tokens: int = 0
    status: str = OK


class LoadGenerator:
    """Replays arrivals. `vocabulary`: token ids to make prompts of.

    A request ends after `timeout` seconds, or when the whole run has lasted for `limit` seconds, whichever is first.
    """

    def __init__(
        self,
        target: Target,
        vocabulary: range,
        *,
        timeout: float | None = None,
        limit: float | None = None,
        seed: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._vocabulary = vocabulary
        self._timeout = timeout
        self._limit = limit
        self._seed = seed
        self._clock = clock

    async def run(self, arrivals: Sequence[Arrival], tally: Tally) -> list[Record]:
        """Sends all, waits for all; records in the order of their ends."""
        start = self._clock() + START_DELAY
        end = None if self._limit is None else start + self._limit
        async with asyncio.TaskGroup() as requests:
            for arrival in arrivals:
                prompt = synthesise(arrival.prompt, self._vocabulary, self._seed)
                await asyncio.sleep(start + arrival.at - self._clock())
                requests.create_task(self._request(arrival, prompt, start + arrival.at, end, tally))
        return tally.records

    async def _request(
        self, arrival: Arrival, prompt: Sequence[int], scheduled: float, end: float | None, tally: Tally
    ) -> None:
        sent = self._clock()
        tally.sent += 1
        observed = _Observed()
        bounds = [bound for bound in (self._timeout, end and end - sent) if bound is not None]
        try:
            async with asyncio.timeout(min(bounds, default=None)):
                await self._consume(prompt, arrival.output_tokens, observed, tally)
        except TimeoutError:
            observed.status = DeadlineExceeded.code.name
        except KvmeshError as error:
            observed.status = error.code.name
        tally.records.append(
            Record(
                scheduled,
                sent,
                self._clock(),
                observed.status,
                len(prompt),
                observed.cached_tokens,
                tuple(observed.arrivals),
            )
        )

    async def _consume(self, prompt: Sequence[int], output_tokens: int, observed: _Observed, tally: Tally) -> None:
        async with aclosing(self._target.ask(prompt, output_tokens)) as messages:
            async for message in messages:
                if message.tokens:
                    observed.arrivals.append((self._clock(), message.tokens))
                    tally.tokens += message.tokens
                observed.cached_tokens += message.cached_tokens
