"""What this worker's hardware draws, sampled once a second beside the event loop. Knows no policy and no metric."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

from kvmesh.errors import Unavailable
from kvmesh.power.find import wattmeter
from kvmesh.power.meter import Wattmeter
from kvmesh.types import WorkerStatistics
from kvmesh.worker.config import WorkerConfig

log = logging.getLogger(__name__)
SAMPLE_SECONDS = 1.0


class PowerWatch:
    """Without a meter it reports nothing, at no cost."""

    def __init__(self, meter: Wattmeter | None = None) -> None:
        self._meter = meter

    @classmethod
    async def open(cls, config: WorkerConfig) -> PowerWatch:
        """Raises Unavailable if the config names a meter that cannot be read."""
        return cls(await asyncio.to_thread(_wattmeter, config))

    async def run(self) -> None:
        """Samples for as long as the meter can be read."""
        while self._meter is not None:
            try:
                await asyncio.to_thread(self._meter.sample, time.monotonic())
            except Unavailable as error:
                log.warning("power is no longer measured: %s", error)
                self._meter = None
            await asyncio.sleep(SAMPLE_SECONDS)

    def report(self, statistics: WorkerStatistics) -> None:
        if self._meter is not None:
            statistics.power_watts = self._meter.watts
            statistics.energy_joules_total = self._meter.joules
            statistics.power_domain = self._meter.domain


def _wattmeter(config: WorkerConfig) -> Wattmeter | None:
    return wattmeter(config.power_meter, socket.gethostname(), config.power_accelerators, config.powercap_path)
