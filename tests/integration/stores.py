"""Stores that come and go in this event loop, a client for them, and their index."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from inspect import isawaitable

import numpy as np

from kvmesh import redis_server
from kvmesh.kv.bitstream import encode
from kvmesh.kv.client import StoreClient
from kvmesh.kv.index import ChunkIndex
from kvmesh.kv.ticket import write_ticket
from kvmesh.registry import Registry
from kvmesh.rpc.channel import ChannelPool
from kvmesh.types import CHUNK_TOKENS, ChunkSource, KvTicket
from kvmesh.v1 import kvstore_pb2_grpc as grpc_pb
from kvmesh_kvstore.config import KvStoreConfig
from kvmesh_kvstore.process import KvStoreProcess, kvstore

CHUNK = len(encode(np.zeros((2, 2, CHUNK_TOKENS, 1, 8), "<f4"), "float32", 0))


class Stores:
    """Stores that come and go, a client for them, and their index."""

    def __init__(self, redis: redis_server.RedisServer, stack: AsyncExitStack) -> None:
        self.redis_url = redis.url
        self._stack = stack
        self._lives: dict[str, AsyncExitStack] = {}
        self.channels = ChannelPool()
        self.client = StoreClient(self.channels, timeout=5.0)
        self.registry = Registry(redis.url)
        self.index = ChunkIndex(self.registry.redis)

    @asynccontextmanager
    async def running(self, name: str, **settings) -> AsyncIterator[KvStoreProcess]:
        stall = settings.pop("stall_seconds", 30.0)
        config = KvStoreConfig(redis_url=self.redis_url, worker_id=name, **{"memory_bytes": 4 * CHUNK, **settings})
        async with kvstore(config, stall_seconds=stall) as process:
            yield process

    async def start(self, name: str = "store", **settings) -> KvStoreProcess:
        life = self._lives[name] = await self._stack.enter_async_context(AsyncExitStack())
        return await life.enter_async_context(self.running(name, **settings))

    async def kill(self, name: str) -> None:
        """At once: what was under way breaks off."""
        await self._lives[name].aclose()

    def stub(self, process: KvStoreProcess) -> grpc_pb.KvStoreServiceAsyncStub:
        return grpc_pb.KvStoreServiceStub(self.channels.get(process.info.address))

    async def get(self, ticket: KvTicket, timeout: float = 5.0) -> list[bytes | None]:
        async with aclosing(self.client.get(ticket, ticket.chunks, timeout_per_chunk=timeout)) as chunks:
            found = [(chunk, bitstream) async for chunk, bitstream in chunks]
        assert [chunk for chunk, _ in found] == [*ticket.chunks]
        return [bitstream for _, bitstream in found]


def bitstream(i: int, tokens: int = CHUNK_TOKENS) -> bytes:
    return encode(np.full((2, 2, tokens, 1, 8), i, "<f4"), "float32", 0)


def ticket_for(
    *stores: KvStoreProcess, tokens: int = 2 * CHUNK_TOKENS, salt: str = "", ttl: float = 30.0, replicas: int = 1
) -> KvTicket:
    return write_ticket(
        fingerprint="f",
        salt=salt,
        tokens=range(tokens),
        layers=(0, 2),
        sources=[ChunkSource(store.info.worker_id, store.info.address) for store in stores],
        lease_id=secrets.token_hex(8),
        ttl_ms=int(1000 * ttl),
        replicas=replicas,
    )


async def fill(stores: Stores, ticket: KvTicket) -> list[bytes]:
    """Acquires the lease and puts every chunk."""
    await stores.client.acquire(ticket)
    sent = [bitstream(i, chunk.tokens) for i, chunk in enumerate(ticket.chunks)]
    for i, data in enumerate(sent):
        assert await stores.client.put(ticket, i, data, timeout=5.0)
    return sent


async def assert_clean(process: KvStoreProcess, chunks: int | None = None) -> None:
    assert await process.vault.check_integrity() == []
    assert len(process.vault.store.leases) == 0
    assert chunks is None or len(process.vault.store) == chunks


async def eventually(condition) -> None:
    """Waits for what other tasks bring about; the test's timeout bounds it."""
    async with asyncio.timeout(10.0):
        while True:
            met = condition()
            if await met if isawaitable(met) else met:
                return
            await asyncio.sleep(0.01)
