"""Caps the clocks of this worker's accelerators while whoever watches the power asks for it. Decides nothing itself.

A cap is leased: a router that dies leaves no worker slow, and a worker that leaves frees its accelerators.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc.aio

from kvmesh.errors import InvalidArgument, KvmeshError, Mismatch
from kvmesh.power import nvml
from kvmesh.rpc.server import Service
from kvmesh.v1 import common_pb2 as pb
from kvmesh.v1.common_pb2_grpc import PowerServiceServicer, add_PowerServiceServicer_to_server
from kvmesh.worker.config import WorkerConfig

log = logging.getLogger(__name__)
NAME = "kvmesh.v1.PowerService"
Context = grpc.aio.ServicerContext[Any, Any]
FULL_CLOCK = 1.0
MAX_LEASE_SECONDS = 600.0


class Clocks(Protocol):
    """What can be capped: `kvmesh.power.nvml.NvmlClocks`."""

    def cap(self, share: float) -> None:
        """Of the highest clock; 1 frees. Blocks for milliseconds; raises Unavailable where it may not."""


class ClockCap(PowerServiceServicer):
    """Implements `kvmesh.v1.PowerService`; without `clocks` it refuses."""

    def __init__(self, clocks: Clocks | None = None) -> None:
        self._clocks = clocks
        self._share = FULL_CLOCK
        self._setting = asyncio.Lock()
        self._expiry: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def opened(cls, config: WorkerConfig) -> AsyncIterator[ClockCap]:
        """As the settings say; on leaving the block the clocks are free.

        Raises:
            Unavailable: the settings name clocks that are not there.
        """
        cap = cls(await asyncio.to_thread(_clocks, config))
        try:
            yield cap
        finally:
            await cap.close()

    @property
    def service(self) -> Service:
        return Service(NAME, lambda server: add_PowerServiceServicer_to_server(self, server))

    async def CapClock(self, request: pb.CapClockRequest, context: Context) -> pb.CapClockResponse:
        _check(request)
        await self.cap(request.clock, request.lease_seconds)
        return pb.CapClockResponse()

    async def cap(self, share: float, seconds: float) -> None:
        """Raises Mismatch without clocks to set, Unavailable where they may not be set."""
        if self._clocks is None:
            raise Mismatch("this worker's clocks are its own: KVMESH_POWER_CLOCKS=nvml lets a power budget set them")
        await self._set(share)
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = asyncio.create_task(self._expire(seconds)) if share < FULL_CLOCK else None

    async def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            await self._free()

    async def _expire(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._expiry = None
        log.warning("nobody renewed the cap of the clocks: they are free")
        await self._free()

    async def _free(self) -> None:
        try:
            await self._set(FULL_CLOCK)
        except KvmeshError as error:
            log.error("the clocks stay capped: %s", error)

    async def _set(self, share: float) -> None:
        async with self._setting:
            if self._clocks is None or share == self._share:
                return
            await asyncio.to_thread(self._clocks.cap, share)
            log.info("clocks at %.0f %% of the highest", 100 * share)
            self._share = share


def _check(request: pb.CapClockRequest) -> None:
    violations = []
    if not 0 < request.clock <= FULL_CLOCK:
        violations.append(("clock", "must be in (0, 1]"))
    if not 0 < request.lease_seconds <= MAX_LEASE_SECONDS:
        violations.append(("lease_seconds", f"must be in (0, {MAX_LEASE_SECONDS:.0f}]"))
    if violations:
        raise InvalidArgument(violations=violations)


def _clocks(config: WorkerConfig) -> Clocks | None:
    if config.power_clocks == "none":
        return None
    library = nvml.load()
    return nvml.NvmlClocks(library, nvml.devices(library, config.power_accelerators))
