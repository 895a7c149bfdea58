"""What operators ask of all stores at once: readings, lists, checks, evictions. Knows no terminal.

A store that does not answer is left out, by name: nobody waits for it, and nothing is said on its behalf.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from kvmesh.errors import KvmeshError
from kvmesh.kv.reading import Channels
from kvmesh.rpc.stream import stream, unary
from kvmesh.types import WorkerInfo
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as rpc

T = TypeVar("T")
Filter = pb.ChunkFilter
Progress = Callable[[str, int, int], None]
"""Called with (store, chunks verified, chunks in all)."""


class StoreAdmin:
    """`stores`: those to ask; `timeout` in seconds bounds a call, or the silence of a long one."""

    def __init__(self, channels: Channels, stores: Sequence[WorkerInfo], *, timeout: float = 5.0) -> None:
        self._channels, self._timeout = channels, timeout
        self.stores = {store.worker_id: store for store in stores}
        self.silent: dict[str, str] = {}
        """Stores that did not answer, and why."""

    async def tiers(self) -> dict[str, pb.GetTiersResponse]:
        return await self._each(
            lambda name: unary(self._at(name).GetTiers(pb.GetTiersRequest(), timeout=self._timeout))
        )

    async def chunks(self, filter: Filter, limit: int = 0) -> dict[str, list[pb.StoredChunk]]:
        """`limit`: of each store, 0 for all."""

        async def ask(name: str) -> list[pb.StoredChunk]:
            async with stream(self._at(name).ListChunks(pb.ListChunksRequest(filter=filter, limit=limit))) as call:
                return [chunk async for page in self._heard(call) for chunk in page.chunks]

        return await self._each(ask)

    async def verify(self, filter: Filter, report: Progress) -> dict[str, tuple[int, list[bytes]]]:
        """For each store how many chunks were verified, and the keys of those found damaged, which are dropped."""

        async def ask(name: str) -> tuple[int, list[bytes]]:
            verified, damaged = 0, list[bytes]()
            async with stream(self._at(name).VerifyChunks(pb.VerifyChunksRequest(filter=filter))) as call:
                async for part in self._heard(call):
                    verified = part.verified
                    damaged += part.damaged_keys
                    report(name, part.verified, part.total)
            return verified, damaged

        return await self._each(ask)

    async def evict(self, filter: Filter, *, all: bool) -> dict[str, pb.EvictChunksResponse]:
        """`all`: an empty filter is meant to be empty."""
        request = pb.EvictChunksRequest(filter=filter, all=all)
        return await self._each(lambda name: unary(self._at(name).EvictChunks(request, timeout=60 * self._timeout)))

    async def _heard(self, call: AsyncIterable[T]) -> AsyncIterator[T]:
        parts = aiter(call)
        while True:
            async with asyncio.timeout(self._timeout):
                part = await anext(parts, None)
            if part is None:
                return
            yield part

    async def _each(self, ask: Callable[[str], Awaitable[T]]) -> dict[str, T]:
        async def attempt(name: str) -> T | None:
            try:
                return await ask(name)
            except (KvmeshError, TimeoutError) as error:
                self.silent[name] = str(error) or "it is too slow"
                return None

        answers = await asyncio.gather(*map(attempt, self.stores))
        return {name: answer for name, answer in zip(self.stores, answers, strict=True) if answer is not None}

    def _at(self, name: str) -> rpc.StoreAdminServiceAsyncStub:
        return rpc.StoreAdminServiceStub(self._channels.get(self.stores[name].address))
