"""One put stream: parts in, a result for each chunk out. Knows no proto."""

from __future__ import annotations

from kvmesh_kvstore.chunks import Offer
from kvmesh_kvstore.incoming import Assembly
from kvmesh_kvstore.vault import PutStatus, Vault


class Allowance:
    """Bytes that chunks on their way in may take, over all streams: they count in no tier yet."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def take(self, size: int) -> bool:
        granted = size <= self._left
        self._left -= size if granted else 0
        return granted

    def give_back(self, size: int) -> None:
        self._left += size


class Reception:
    """Close it whatever happens: what has arrived of an unfinished chunk is dropped then."""

    def __init__(self, vault: Vault, allowance: Allowance, lease_id: str | None) -> None:
        self.results: list[tuple[bytes, PutStatus]] = []
        self._vault, self._allowance, self._lease_id = vault, allowance, lease_id
        self._assembly = Assembly()
        self._taken = 0
        self._verdict: PutStatus | None = None

    def header(self, offer: Offer) -> None:
        """Raises InvalidArgument, and NotFound for the lease. A chunk whose fate is clear now is read past."""
        self._assembly.check(offer)
        self._verdict = self._judge(offer)
        self._assembly.open(offer, keep=self._verdict is None)

    async def data(self, data: bytes) -> None:
        """Raises InvalidArgument, and NotFound for the lease."""
        arrival = self._assembly.feed(data)
        if arrival is not None:
            status = self._verdict or await self._vault.put(arrival.offer, arrival.bitstream, self._lease_id)
            self.results.append((arrival.offer.key, status))
            self.close()

    def end(self) -> None:
        """Raises InvalidArgument if a chunk is unfinished."""
        self._assembly.end()

    def close(self) -> None:
        self._allowance.give_back(self._taken)
        self._taken = 0

    def _judge(self, offer: Offer) -> PutStatus | None:
        store = self._vault.store
        if store.exists(offer, self._lease_id, self._vault.now):
            return PutStatus.EXISTS
        if not store.could_ever_place(offer) or not self._allowance.take(offer.size):
            return PutStatus.FULL
        self._taken = offer.size
        return None
