"""Who holds what until when. Pure: time is an argument, in seconds of any one clock. Knows keys, not chunks."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmesh.errors import NotFound, Overloaded

MAX_LEASES = 65_536
MAX_TTL = 120.0


@dataclass(slots=True)
class Lease:
    expires: float
    pins: set[bytes] = field(default_factory=set)
    """Keys of the chunks that it holds."""


class LeaseTable:
    def __init__(self, max_leases: int = MAX_LEASES, max_ttl: float = MAX_TTL) -> None:
        self._leases: dict[str, Lease] = {}
        self._max_leases, self._max_ttl = max_leases, max_ttl

    def __len__(self) -> int:
        return len(self._leases)

    def __getitem__(self, lease_id: str) -> Lease:
        return self._leases[lease_id]

    def acquire(self, lease_id: str, ttl: float, now: float) -> float:
        """Grants or extends a lease; the seconds granted. Raises Overloaded if there are too many."""
        if lease_id not in self._leases and len(self._leases) >= self._max_leases:
            raise Overloaded(f"there are {self._max_leases} leases already")
        return self._extend(self._leases.setdefault(lease_id, Lease(now)), ttl, now)

    def renew(self, lease_id: str, ttl: float, now: float) -> float:
        """Extends a lease; the seconds granted. Raises NotFound."""
        return self._extend(self.live(lease_id, now), ttl, now)

    def live(self, lease_id: str, now: float) -> Lease:
        """The lease, unless it does not exist or has expired: NotFound."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.expires <= now:
            raise NotFound(f"there is no lease {lease_id!r}, or it has expired")
        return lease

    def late(self, now: float) -> list[str]:
        """The leases that ran out and are yet to be ended."""
        return [lease_id for lease_id, lease in self._leases.items() if lease.expires <= now]

    def pop(self, lease_id: str) -> Lease | None:
        return self._leases.pop(lease_id, None)

    def holders(self) -> dict[bytes, set[str]]:
        """For each pinned key the leases that pin it."""
        held: dict[bytes, set[str]] = {}
        for lease_id, lease in self._leases.items():
            for key in lease.pins:
                held.setdefault(key, set()).add(lease_id)
        return held

    def _extend(self, lease: Lease, ttl: float, now: float) -> float:
        granted = min(ttl, self._max_ttl)
        lease.expires = max(lease.expires, now + granted)
        return granted
