"""The life of an engine process: load, serve, register, watch the engine, drain, leave.

    load model ─> engine thread ─> gRPC server ─> registered ─> … ─> drain: refuse, deregister, finish ─> stop

What the process serves is given by the service. Reads no environment and handles no signal: `main` does.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

from kvmesh.engine.api import Engine
from kvmesh.errors import KvmeshError
from kvmesh.kv.client import StoreClient
from kvmesh.process import Base, base
from kvmesh.registry import Registry
from kvmesh.rpc.server import Server, Service
from kvmesh.telemetry import Telemetry
from kvmesh.types import Role, WorkerInfo
from kvmesh.worker.clock import ClockCap
from kvmesh.worker.config import WorkerConfig
from kvmesh.worker.job import Model
from kvmesh.worker.meter import Meter
from kvmesh.worker.model import load_model
from kvmesh.worker.power import PowerWatch
from kvmesh.worker.thread import EngineThread
from kvmesh.worker.traffic import Traffic
from kvmesh.worker.worker import Worker

WATCH_SECONDS = 1.0


class WorkerProcess:
    """A worker that serves and is registered."""

    def __init__(self, ground: Base, worker: Worker, server: Server, registration: AsyncExitStack) -> None:
        self.info, self.superseded = ground.info, ground.superseded
        self.worker = worker
        self._server = server
        self._registration = registration

    async def failed(self) -> None:
        """Returns when the engine is beyond help."""
        await self.worker.engine.failed.wait()

    async def drain(self, grace: float) -> None:
        """Refuses new work, leaves the registry, lets what runs end within `grace` seconds, stops serving."""
        self._server.health.drain()
        self.worker.sessions.refuse()
        await self._registration.aclose()
        await self.worker.sessions.drain(grace)
        await self.worker.leases.close()
        await self._server.drain(1.0)

    async def watch(self, telemetry: Telemetry) -> None:
        """Says NOT_SERVING while the engine hangs, for good once it has failed; feeds the metrics."""
        meter, serving = Meter(telemetry.metrics), True
        failed = self.worker.engine.failed
        while not failed.is_set():
            if serving != self.worker.alive():
                serving = not serving
                self._server.health.set("", serving)
            if telemetry.metrics_port is not None and serving:
                with suppress(KvmeshError, TimeoutError):
                    meter.observe(await asyncio.wait_for(self.worker.statistics(), WATCH_SECONDS))
            with suppress(TimeoutError):
                await asyncio.wait_for(failed.wait(), WATCH_SECONDS)
        self._server.health.drain()
        await self._registration.aclose()


@asynccontextmanager
async def worker_process(
    config: WorkerConfig, role: Role, *compose: Callable[[Worker], Service]
) -> AsyncIterator[WorkerProcess]:
    """A running worker, registered as `role`, that serves what `compose` makes of its parts; stops at once on exit.

    Raises:
        KvmeshError: the model cannot be had, or the port cannot be bound.
    """
    power = await PowerWatch.open(config)
    model, engine = await _load(config)
    async with AsyncExitStack() as stack:
        ground = await stack.enter_async_context(base(config, role, _description(model)))
        cores = _cores()
        pool = stack.enter_context(ThreadPoolExecutor(cores, "codec"))
        traffic = Traffic(lambda: ground.info.address, cores, config.quality)
        if model.speed:
            traffic.expect(model.speed)
        thread = await stack.enter_async_context(EngineThread(engine))
        store = StoreClient(ground.channels)
        sampling = asyncio.create_task(power.run())
        stack.callback(sampling.cancel)
        peers = partial(_peers, ground.registry)
        worker = Worker.build(model, thread, store, pool, peers, traffic, power)
        stack.push_async_callback(worker.leases.close)
        clock = await stack.enter_async_context(ClockCap.opened(config))
        services = [clock.service, *(one(worker) for one in compose)]
        server = await stack.enter_async_context(ground.serving(services, worker.statistics))
        registration = await stack.enter_async_context(AsyncExitStack())
        await registration.enter_async_context(ground.registered())
        process = WorkerProcess(ground, worker, server, registration)
        watch = asyncio.create_task(process.watch(ground.telemetry))
        stack.callback(watch.cancel)
        yield process


async def _load(config: WorkerConfig) -> tuple[Model, Engine]:
    """In a daemon thread: a download does not outlive the wish for it."""
    result: Future[tuple[Model, Engine]] = Future()

    def work() -> None:
        with suppress(InvalidStateError):  # cancelled meanwhile
            try:
                result.set_result(load_model(config))
            except Exception as error:
                result.set_exception(error)

    threading.Thread(target=work, name="load", daemon=True).start()
    return await asyncio.wrap_future(result)


def _cores() -> int:
    """That this process may use: what encodes and decodes takes those that are idle."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _description(model: Model) -> WorkerInfo:
    """What the registry is told of the model; the rest is every process's."""
    return WorkerInfo("", 0, Role.PREFILL, "", 0, model.name, model.fingerprint, model.layout, model.capacity)


async def _peers(registry: Registry) -> list[WorkerInfo]:
    with suppress(KvmeshError):
        return await registry.list()
    return []
