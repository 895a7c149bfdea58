"""Keeps the mesh within its power budget: watches what the workers report, and admits fewer requests near it.

The levels are POLCA's (`kvmesh.scheduling.power`); where they would lower clocks, the gate is narrowed, to a share of
what ran when the level was reached. Workers that measure one domain are counted once. Sets no clock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvmesh.background import background
from kvmesh.scheduling.power import Level, PowerPolicy
from kvmesh.telemetry import Metrics
from kvmesh.types import Role, WorkerInfo
from kvmesh.v1 import common_pb2
from kvmesh_router.flow import Flow
from kvmesh_router.gate import Gate

log = logging.getLogger(__name__)
READ_SECONDS = 1.0

Watts = Mapping[str, float]
"""By domain."""


@dataclass(slots=True)
class PowerGuard:
    policy: PowerPolicy
    gate: Gate
    read: Callable[[], Awaitable[Watts]]
    metrics: Metrics
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
            await asyncio.sleep(READ_SECONDS)

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
        workers = [info for info in flow.directory.workers() if info.role in (Role.PREFILL, Role.DECODE)]
        return by_domain(await asyncio.gather(*(_ask(flow, info) for info in workers)))

    return read


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
