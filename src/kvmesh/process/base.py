"""What a service stands on: its name and epoch, the registry, telemetry and channels; and how it serves and registers.

Reads no environment and handles no signal. Tests enter a service's composition function in their own event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from inspect import isawaitable

from kvmesh import __version__
from kvmesh.process.config import ProcessConfig
from kvmesh.registry import Registration, Registry
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.options import Options
from kvmesh.rpc.server import Server, Service, serve
from kvmesh.rpc.worker_service import ReadStatistics, WorkerServicer
from kvmesh.telemetry import Telemetry, setup
from kvmesh.types import Role, WorkerInfo, WorkerStatistics

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Base:
    """`info.address` is empty until the process serves. `superseded`: a younger process has taken its worker_id."""

    config: ProcessConfig
    info: WorkerInfo
    registry: Registry
    telemetry: Telemetry
    channels: ChannelPool
    superseded: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def serving(self, services: Sequence[Service], statistics: ReadStatistics) -> AsyncIterator[Server]:
        """Serves these and WorkerService; from then on `info` is complete.

        Raises:
            Unavailable: the port cannot be bound.
        """
        config = self.config
        every = [*services, WorkerServicer(lambda: self.info, self._dated(statistics)).service]
        async with serve(host=config.host, port=config.port, services=every, telemetry=self.telemetry) as server:
            port = server.address.rpartition(":")[2]
            self.info = replace(self.info, address=f"{config.advertise or config.host}:{port}")
            yield server

    def _dated(self, statistics: ReadStatistics) -> ReadStatistics:
        """With the uptime, which is every process's."""

        async def read(check_integrity: bool) -> WorkerStatistics:
            reading = statistics(check_integrity)
            result = await reading if isawaitable(reading) else reading
            result.uptime_seconds = time.time() - self.info.started_at
            return result

        return read

    def registered(self) -> AbstractAsyncContextManager[Registration]:
        """In the registry until the block is left; only once it serves."""
        return self.registry.register(self.info, self.superseded)


@asynccontextmanager
async def base(
    config: ProcessConfig, role: Role, described: WorkerInfo | None = None, channel_options: Options = ()
) -> AsyncIterator[Base]:
    """The ground under a process of `role`; `described` has the fields that depend on its model or tiers.

    Raises:
        KvmeshError: telemetry cannot start, or the Redis URL is none.
    """
    worker_id = config.worker_id or f"{role}-{socket.gethostname()}-{config.port or secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        telemetry = setup(
            role,
            worker_id,
            otlp_endpoint=config.otlp_endpoint,
            metrics_port=config.metrics_port,
            trace_file=config.trace_file,
            metrics_host=config.host,
        )
        if telemetry.metrics_port is not None:
            log.info("metrics at http://%s:%d/metrics", config.host, telemetry.metrics_port)
        # A collector that is away may hold up the last export for seconds.
        stack.push_async_callback(asyncio.to_thread, telemetry.shutdown)
        registry = Registry(config.redis_url, config.registry_ttl)
        stack.push_async_callback(registry.close)
        channels = ChannelPool(telemetry, channel_options)
        stack.push_async_callback(channels.close)
        info = replace(
            described or WorkerInfo(worker_id, 0, role, "", 0),
            worker_id=worker_id,
            epoch=await registry.next_epoch(worker_id),
            role=role,
            pid=os.getpid(),
            started_at=time.time(),
            version=__version__,
        )
        yield Base(config, info, registry, telemetry, channels)
