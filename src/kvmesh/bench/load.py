"""Sends a workload to a router, open loop: a request goes out when it is due, whatever became of those before.

Knows the client and the clock; what the figures mean is `statistics`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.bench.prompts import synthesise
from kvmesh.bench.statistics import OK, Record
from kvmesh.bench.workload import Arrival
from kvmesh.client import AsyncClient, Delta, Finish
from kvmesh.errors import KvmeshError

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
    """Replays arrivals through `client`. `vocabulary`: token ids to make prompts of; `timeout`: seconds a request."""

    def __init__(
        self,
        client: AsyncClient,
        vocabulary: range,
        *,
        timeout: float | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._vocabulary = vocabulary
        self._timeout = timeout
        self._seed = seed
        self._clock = clock

    async def run(self, arrivals: Sequence[Arrival], tally: Tally) -> list[Record]:
        """Sends all, waits for all; records in the order of their ends."""
        start = self._clock() + START_DELAY
        async with asyncio.TaskGroup() as requests:
            for arrival in arrivals:
                prompt = synthesise(arrival.prompt, self._vocabulary, self._seed)
                await asyncio.sleep(start + arrival.at - self._clock())
                requests.create_task(self._request(arrival, prompt, start + arrival.at, tally))
        return tally.records

    async def _request(self, arrival: Arrival, prompt: Sequence[int], scheduled: float, tally: Tally) -> None:
        sent = self._clock()
        tally.sent += 1
        observed = _Observed()
        try:
            await self._consume(prompt, arrival.output_tokens, observed, tally)
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
        """Asks for exactly `output_tokens`, end of sequence or not: the workload is the trace's, not the model's."""
        stream = self._client.generate(
            token_ids=prompt, max_tokens=output_tokens, ignore_eos=True, temperature=0.0, timeout=self._timeout
        )
        async with stream:
            async for event in stream:
                match event:
                    case Delta(token_ids=tokens) if tokens:
                        observed.arrivals.append((self._clock(), len(tokens)))
                        tally.tokens += len(tokens)
                    case Finish(usage=usage):
                        observed.cached_tokens = usage.cached_tokens
