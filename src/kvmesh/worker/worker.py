"""What a flow has at hand: the parts of one worker, put together. Knows no service and no process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass

from kvmesh.kv.client import StoreClient
from kvmesh.types import WorkerInfo, WorkerStatistics
from kvmesh.worker.job import Job, Model, check, matches
from kvmesh.worker.lease import Leases
from kvmesh.worker.power import PowerWatch
from kvmesh.worker.publication import Publication
from kvmesh.worker.session import Sessions
from kvmesh.worker.thread import EngineThread
from kvmesh.worker.traffic import Traffic
from kvmesh.worker.transfer import Importer

DEFAULT_DEADLINE = 600.0
"""Seconds that a request has whose caller set no deadline."""


@dataclass(frozen=True)
class Worker:
    """Of prefill and decode alike. `pool` encodes and decodes; `peers` asks who is in the mesh."""

    model: Model
    engine: EngineThread
    store: StoreClient
    sessions: Sessions
    leases: Leases
    importer: Importer
    pool: Executor
    peers: Callable[[], Awaitable[Iterable[WorkerInfo]]]
    traffic: Traffic
    power: PowerWatch

    @classmethod
    def build(
        cls,
        model: Model,
        engine: EngineThread,
        store: StoreClient,
        pool: Executor,
        peers: Callable[[], Awaitable[Iterable[WorkerInfo]]],
        traffic: Traffic | None = None,
        power: PowerWatch | None = None,
    ) -> Worker:
        traffic = traffic or Traffic()
        importer = Importer(store, engine, pool, codec=model.codec, traffic=traffic)
        sessions, leases = Sessions(engine), Leases(store)
        return cls(model, engine, store, sessions, leases, importer, pool, peers, traffic, power or PowerWatch())

    def alive(self) -> bool:
        return self.engine.alive

    def publication(self, job: Job, missing: Collection[int] | None) -> Publication:
        return Publication(
            self.store,
            self.pool,
            job.ticket,
            missing,
            dtype=self.engine.layout.dtype,
            codec=self.model.codec,
            traffic=self.traffic,
            readers=job.readers,
        )

    async def check(self, job: Job) -> None:
        """Refuses what cannot be computed here; see `job.check`."""
        peers = () if matches(job, self.model) else await self.peers()
        check(job, self.model, peers)

    async def statistics(self, check_integrity: bool = False) -> WorkerStatistics:
        statistics = await self.engine.statistics()
        statistics.leases = self.leases.count
        statistics.draining = self.sessions.draining
        self.traffic.report(statistics)
        statistics.missed_replicas_total = self.store.missed_replicas
        self.power.report(statistics)
        if check_integrity:
            statistics.integrity_errors = await self.engine.check_integrity()
        return statistics
