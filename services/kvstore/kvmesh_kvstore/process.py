"""The life of a kvstore process: open the tiers, serve, register, announce, sweep, drain, leave.

Reads no environment and handles no signal: `__main__` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from kvmesh.background import background
from kvmesh.kv.bitstream import MAX_BITSTREAM_BYTES
from kvmesh.kv.index import ChunkIndex
from kvmesh.process import Base, base, never
from kvmesh.registry import Directory
from kvmesh.rpc.deadline import Deadline
from kvmesh.rpc.server import Server, Service
from kvmesh.types import Role, WorkerCapacity, WorkerInfo, WorkerStatistics
from kvmesh.v1 import kvstore_pb2_grpc as grpc_pb
from kvmesh_kvstore.admin import StoreAdminServicer
from kvmesh_kvstore.blobs import Blobs
from kvmesh_kvstore.config import KvStoreConfig
from kvmesh_kvstore.events import EventLog
from kvmesh_kvstore.index import Announcer
from kvmesh_kvstore.meter import Meter
from kvmesh_kvstore.pull import Puller
from kvmesh_kvstore.reception import Allowance
from kvmesh_kvstore.remote import RemoteTier, connect
from kvmesh_kvstore.servicer import STALL_SECONDS, KvStoreServicer
from kvmesh_kvstore.store import ChunkStore
from kvmesh_kvstore.tiers import DiskTier
from kvmesh_kvstore.vault import Vault

SWEEP_SECONDS = 0.5
POOL_THREADS = 4


class KvStoreProcess:
    """A kvstore that serves and is registered."""

    def __init__(self, ground: Base, vault: Vault, server: Server, presence: AsyncExitStack) -> None:
        self.info, self.superseded, self.vault = ground.info, ground.superseded, vault
        self._server, self._presence = server, presence

    async def failed(self) -> None:
        await never()

    async def drain(self, grace: float) -> None:
        """Leaves registry and index, saves what it can and lets the calls that run end, all within `grace` seconds.

        Idempotent.
        """
        deadline = Deadline.after(grace)
        self._server.health.drain()
        self.vault.events.close()
        await self._presence.aclose()
        await self.vault.save(grace / 2)
        await self._server.drain(deadline.remaining())


@asynccontextmanager
async def kvstore(config: KvStoreConfig, *, stall_seconds: float = STALL_SECONDS) -> AsyncIterator[KvStoreProcess]:
    """A running kvstore; stops at once on exit: `drain` first to be graceful.

    Raises:
        KvmeshError: the port cannot be bound, or the folder is not to be had.
    """
    async with base(config, Role.KVSTORE, _description(config)) as ground, AsyncExitStack() as stack:
        registry = ground.registry
        pool = stack.enter_context(ThreadPoolExecutor(POOL_THREADS, "blobs"))
        store = ChunkStore(config.memory_bytes, config.disk_bytes, quota=config.quota_bytes)
        remote = await stack.enter_async_context(_remote(config))
        announcer = Announcer(
            ChunkIndex(registry.redis, 3 * config.registry_ttl), ground.info.worker_id, store.shared_keys
        )
        vault = Vault(store, Blobs(pool, _disk(config)), EventLog(), announcer=announcer, remote=remote)
        await vault.open()
        stack.push_async_callback(vault.close)
        meter = Meter(store, ground.telemetry.metrics, remote)
        services = _services(vault, ground.info.epoch, stall_seconds)
        server = await stack.enter_async_context(ground.serving(services, partial(_statistics, vault, meter)))
        presence = await stack.enter_async_context(AsyncExitStack())
        await presence.enter_async_context(background(_sweep(vault, meter), "sweep"))
        presence.push_async_callback(partial(_withdraw, ground, announcer))
        await presence.enter_async_context(background(announcer.run(), "announcer"))
        await presence.enter_async_context(ground.registered())
        await presence.enter_async_context(_pulling(config, ground, vault))
        yield KvStoreProcess(ground, vault, server, presence)


def _description(config: KvStoreConfig) -> WorkerInfo:
    """What the registry is told of the tiers; the rest is every process's."""
    capacity = WorkerCapacity(memory_bytes=config.memory_bytes, disk_bytes=config.disk_bytes)
    return WorkerInfo("", 0, Role.KVSTORE, "", 0, capacity=capacity)


def _services(vault: Vault, epoch: int, stall_seconds: float) -> list[Service]:
    allowance = Allowance(max(vault.store.memory.budget, MAX_BITSTREAM_BYTES))
    servicer = KvStoreServicer(vault, epoch, allowance, stall_seconds)
    admin = StoreAdminServicer(vault)
    return [
        Service(
            "kvmesh.v1.StoreAdminService",
            lambda server: grpc_pb.add_StoreAdminServiceServicer_to_server(admin, server),
        ),
        Service(
            "kvmesh.v1.KvStoreService", lambda server: grpc_pb.add_KvStoreServiceServicer_to_server(servicer, server)
        ),
        Service(
            "kvmesh.v1.ChunkSourceService",
            lambda server: grpc_pb.add_ChunkSourceServiceServicer_to_server(servicer, server),
        ),
    ]


async def _withdraw(ground: Base, announcer: Announcer) -> None:
    """Unless a younger process announces its own chunks under this name by now."""
    if not ground.superseded.is_set():
        await announcer.withdraw()


def _disk(config: KvStoreConfig) -> DiskTier | None:
    return DiskTier(config.disk_path) if config.disk_bytes and config.disk_path else None


@asynccontextmanager
async def _pulling(config: KvStoreConfig, ground: Base, vault: Vault) -> AsyncIterator[None]:
    """Copies of what this store has come to own, in the background."""
    if not config.pull_rate:
        yield
        return
    name = ground.info.worker_id
    puller = Puller(vault, ground.channels, name, replicas=config.replicas, rate=config.pull_rate)
    async with Directory(ground.registry) as directory, background(puller.run(directory, config.pull_delay), "puller"):
        yield


@asynccontextmanager
async def _remote(config: KvStoreConfig) -> AsyncIterator[RemoteTier | None]:
    """The remote tier, if there is to be one; whether it answers is found out by using it."""
    if not config.blob_url:
        yield None
        return
    redis = connect(config.blob_url, config.blob_timeout)
    limits = {"ttl": config.blob_ttl, "timeout": config.blob_timeout}
    remote = RemoteTier(redis, config.blob_bytes, quota=config.blob_quota_bytes, **limits)
    try:
        async with background(remote.run(), "remote tier"):
            yield remote
    finally:
        await remote.close()


async def _statistics(vault: Vault, meter: Meter, check_integrity: bool) -> WorkerStatistics:
    statistics = meter.read()
    if check_integrity:
        statistics.integrity_errors = await vault.check_integrity()
    return statistics


async def _sweep(vault: Vault, meter: Meter) -> None:
    """Ends leases that ran out and feeds the metrics, until cancelled."""
    while True:
        vault.sweep()
        meter.observe()
        await asyncio.sleep(SWEEP_SECONDS)
