"""Leases of tickets: taken on entry, renewed while held, and let go by an explicit rule.

Knows no engine. What fails here costs nothing but the lease: the store's TTL ends what nobody releases.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvmesh.kv.client import StoreClient
from kvmesh.types import KvTicket

MIN_RENEWAL = 0.1
"""Seconds between renewals, however short the TTL is."""


class Leases:
    """Every lease that this process holds or is letting go."""

    def __init__(self, store: StoreClient) -> None:
        self._store = store
        self._held: dict[str, int] = {}
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def count(self) -> int:
        return len(self._held) + len(self._releases)

    @asynccontextmanager
    async def hold(self, ticket: KvTicket | None, *, hand_over: bool) -> AsyncIterator[bool]:
        """Holds the ticket's lease in every source that grants it, renewing it every third of its TTL.

        Yields False if none does: the sources are gone or frozen, and asking them for more would only take time.

        `hand_over`: leave it to the next worker on a clean exit. On an error or a cancellation it is always released.
        The release runs on in the background: nobody waits for a store that does not answer.
        """
        if ticket is None or not ticket.chunks:
            yield False
            return
        self._held[ticket.lease_id] = self._held.get(ticket.lease_id, 0) + 1
        renewal = asyncio.create_task(self._keep(ticket))
        keep = False
        try:
            granted = await self._store.acquire(ticket)
            yield bool(granted)
            keep = hand_over
        finally:
            renewal.cancel()
            if not keep:
                self.release_soon(ticket)
            self._drop(ticket.lease_id)

    def release_soon(self, ticket: KvTicket) -> None:
        task = asyncio.create_task(self._store.release(ticket))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def close(self) -> None:
        """Waits for the releases under way; the store client bounds each."""
        await asyncio.gather(*self._releases, return_exceptions=True)

    async def _keep(self, ticket: KvTicket) -> None:
        while True:
            await asyncio.sleep(max(MIN_RENEWAL, ticket.lease_ttl_ms / 3000))
            await self._store.renew(ticket)

    def _drop(self, lease_id: str) -> None:
        self._held[lease_id] -= 1
        if not self._held[lease_id]:
            del self._held[lease_id]
