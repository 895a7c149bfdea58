"""One request's claim on KV: the ticket that the next decode worker gets, and the leases that nobody may leave behind.

A lease belongs to the router from the moment it is written until a decode worker says that it has the KV. Pure; who
releases is told, not known.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvmesh.kv.ticket import write_ticket
from kvmesh.types import ChunkSource, KvTicket, WorkerInfo
from kvmesh_router.events import Request


@dataclass(frozen=True, slots=True)
class Lease:
    """A ticket whose lease somebody may hold, and the prefill worker that does, if one does."""

    ticket: KvTicket
    prefill: WorkerInfo | None = None
    request_id: str = ""


@dataclass(slots=True)
class Claim:
    request: Request
    ttl_ms: int
    replicas: int = 1
    """Stores that are to hold each chunk."""
    leases: list[Lease] = field(default_factory=list)
    _ticket: KvTicket | None = None
    _spent: bool = False

    def write(self, worker: WorkerInfo, stores: Sequence[WorkerInfo]) -> KvTicket:
        """A ticket for the whole prompt in the worker's layout, under a lease of its own."""
        return write_ticket(
            fingerprint=worker.fingerprint,
            salt=self.request.cache_salt,
            tokens=self.request.prompt,
            layers=(worker.capacity.first_layer, worker.capacity.end_layer),
            sources=[ChunkSource(store.worker_id, store.address) for store in stores],
            lease_id=secrets.token_hex(16),
            ttl_ms=self.ttl_ms,
            replicas=self.replicas,
        )

    def give(self, ticket: KvTicket, worker: WorkerInfo, request_id: str) -> None:
        """A prefill worker is about to take the lease."""
        self.leases.append(Lease(ticket, worker, request_id))

    def expect(self, ticket: KvTicket) -> None:
        """The prompt is computed: decode may fetch what the ticket names."""
        self._ticket = ticket

    def for_decode(self) -> KvTicket | None:
        """The same until it is taken over, then one for the full chunks: those are probably still there."""
        if self._ticket is not None and self._spent:
            chunks = tuple(chunk for chunk in self._ticket.chunks if not chunk.tail)
            self._ticket = replace(self._ticket, chunks=chunks, lease_id=secrets.token_hex(16))
            self._spent = False
            self.leases.append(Lease(self._ticket))
        if self._ticket is None or not self._ticket.chunks:
            return None
        return self._ticket

    def taken_over(self) -> None:
        """A decode worker has the KV, and has released the lease."""
        if self._ticket is not None and self._ticket.chunks:
            self.leases = [lease for lease in self.leases if lease.ticket.lease_id != self._ticket.lease_id]
            self._spent = True

    def give_up(self) -> list[Lease]:
        """The leases that are out, to be released."""
        leases, self.leases = self.leases, []
        return [lease for lease in leases if lease.ticket.chunks]
