"""Keeps the mesh within its power budget: watches what the workers report, admits fewer requests near it, and caps the
clocks of those workers that let it.

The levels are POLCA's (`kvmesh.scheduling.power`). The gate is narrowed to a share of what ran when the level was
reached. Workers that measure one domain are counted once. A worker serves requests of any priority, so its clocks are
capped as those of high priority.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvmesh.background import background
from kvmesh.scheduling.power import FULL_CLOCK, Level, PowerPolicy
from kvmesh.telemetry import Metrics
from kvmesh.types import WorkerInfo
from kvmesh.v1 import common_pb2
from kvmesh_router.flow import Flow
from kvmesh_router.gate import Gate

log = logging.getLogger(__name__)
READ_SECONDS = 1.0
CAP_SECONDS = 5 * READ_SECONDS
"""A cap of clocks that is not renewed for so long ends by itself."""

Watts = Mapping[str, float]
"""By domain."""


@dataclass(slots=True)
class PowerGuard:
    policy: PowerPolicy
    gate: Gate
    read: Callable[[], Awaitable[Watts]]
    metrics: Metrics
    cap: Callable[[float], Awaitable[None]]
    """Caps every worker's clocks at a share of the highest, until CAP_SECONDS later."""
    _clock: float = FULL_CLOCK
    _ran: int = 0
    """Requests that ran when the level last rose."""

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Until the block is left."""
        async with background(self._watch(), "power"):
            yield

    async def _watch(self) -> None:
        while True:
            self.observe(await self.read(), time.monotonic())
            await self._cap_clocks()
            await asyncio.sleep(READ_SECONDS)

    async def _cap_clocks(self) -> None:
        before, self._clock = self._clock, self.policy.cap(low_priority=False).clock
        if min(before, self._clock) < FULL_CLOCK:
            await self.cap(self._clock)

    def observe(self, watts: Watts, now: float) -> None:
        """One reading; without any meter nothing is limited."""
        before = self.policy.level
        level = self.policy.decide(sum(watts.values()), now)
        self.metrics.power_level.set(level)
        if level == before:
            return
        log.info("power is %.0f W of %.0f W: %s", sum(watts.values()), self.policy.budget_watts, level.name)
        if level > before:
            self._ran = self.gate.admission.running
        self._narrow(level)

    def _narrow(self, level: Level) -> None:
        if level is Level.FREE:
            self.gate.narrow(None, None)
            return
        high, low = (self.policy.cap(low_priority).admission for low_priority in (False, True))
        self.gate.narrow(None if high >= 1 else max(1, int(self._ran * high)), int(self._ran * low))


def readings(flow: Flow) -> Callable[[], Awaitable[Watts]]:
    """Asks the workers that `flow` knows."""

    async def read() -> Watts:
        return by_domain(await asyncio.gather(*(_ask(flow, info) for info in _engines(flow))))

    return read


@dataclass(slots=True)
class Capping:
    """Caps the clocks of the workers that `flow` knows, and says once of each why that could not be done."""

    flow: Flow
    _refused: dict[str, str] = field(default_factory=dict)

    async def __call__(self, share: float) -> None:
        await asyncio.gather(*(self._cap(info, share) for info in _engines(self.flow)))

    async def _cap(self, worker: WorkerInfo, share: float) -> None:
        why = await self.flow.peers.cap_clock(worker, share, CAP_SECONDS, READ_SECONDS)
        if why and self._refused.get(worker.worker_id) != why:
            log.info("%s keeps its clocks: %s", worker.worker_id, why)
        self._refused[worker.worker_id] = why


def _engines(flow: Flow) -> list[WorkerInfo]:
    return [info for info in flow.directory.workers() if info.role.prefills or info.role.decodes]


async def _ask(flow: Flow, worker: WorkerInfo) -> common_pb2.WorkerStatistics:
    reading = await flow.peers.statistics(worker, False, READ_SECONDS)
    return reading if isinstance(reading, common_pb2.WorkerStatistics) else common_pb2.WorkerStatistics()


def by_domain(statistics: Iterable[common_pb2.WorkerStatistics]) -> Watts:
    """Each domain once, by the highest of its workers' readings."""
    watts: dict[str, float] = {}
    for reading in statistics:
        if reading.power_domain:
            watts[reading.power_domain] = max(watts.get(reading.power_domain, 0.0), reading.power_watts)
    return watts
