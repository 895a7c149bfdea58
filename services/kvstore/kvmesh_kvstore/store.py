"""Which chunks are here, in which tier and who holds them.

Pure and synchronous: neither asyncio, grpc nor a blob; time is an argument, in seconds. Whoever owns the blobs asks
`place()` what to do, does it, reports it here, and asks again until there is room.

Ownership: a chunk is pinned by any number of leases; a tail is owned by one and goes with it. A chunk is on trial until
a second request asks for it; two requests are told apart by their leases. Whether the books agree: `integrity`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvmesh.errors import InvalidArgument
from kvmesh_kvstore.chunks import Entry, Offer, Tier, Traits
from kvmesh_kvstore.eviction import Decision, Eviction
from kvmesh_kvstore.leases import LeaseTable
from kvmesh_kvstore.shelves import Accounts, Ghosts, Shelf


@dataclass(slots=True)
class Counters:
    """Of reads: hits and misses, damaged ones among the misses. Of moves between tiers: demotions and promotions."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    demotions: int = 0
    promotions: int = 0


class ChunkStore:
    """Budgets in bytes of bitstreams; a budget of 0 turns the tier off. `quota`: of each tenant, None for no limit."""

    def __init__(
        self, memory_bytes: int, disk_bytes: int = 0, leases: LeaseTable | None = None, quota: int | None = None
    ) -> None:
        self.memory, self.disk = Shelf(Tier.MEMORY, memory_bytes), Shelf(Tier.DISK, disk_bytes)
        self.accounts = Accounts(quota)
        self.leases = LeaseTable() if leases is None else leases
        self.counters = Counters()
        self.children: Counter[tuple[bytes, bytes]] = Counter()
        self.qualities: Counter[str] = Counter()
        self.raw_bytes = 0
        self._entries: dict[bytes, Entry] = {}
        self._eviction = Eviction(self.memory, self.disk, self.accounts, self.children)
        self._ghosts = Ghosts()
        self._serial = 0

    @property
    def shelves(self) -> tuple[Shelf, Shelf]:
        return self.memory, self.disk

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, entry: Entry) -> bool:
        """Is this very chunk here, not another of its key?"""
        return self._entries.get(entry.key) is entry

    def shared_keys(self) -> list[bytes]:
        """Keys that anybody may ask for: all but the tails'."""
        return [entry.key for entry in self._entries.values() if entry.owner is None]

    # Finding

    def find_missing(self, keys: Sequence[bytes], lease_id: str | None, now: float) -> list[bytes]:
        """Keys not here, in the order asked; the others are touched and, with a lease, pinned. Raises NotFound."""
        if lease_id is not None:
            self.leases.live(lease_id, now)
        # Backwards, so that the end of a prefix is its least recently used: eviction then meets a leaf first.
        missing = [key for key in reversed(keys) if not self._hold(key, lease_id)]
        return missing[::-1]

    def exists(self, offer: Offer, lease_id: str | None, now: float) -> bool:
        """Is the chunk on offer here? Then it is touched and pinned.

        Raises:
            NotFound: the lease does not exist or has expired.
            InvalidArgument: a tail without a lease, a key of another namespace, or a chunk that is its own ancestor.
        """
        if lease_id is not None:
            self.leases.live(lease_id, now)
        elif offer.tail:
            raise InvalidArgument(violations=[("lease_id", "is needed for a tail")])
        known = self._entries.get(offer.key)
        if known is not None and known.offer.fingerprint != offer.fingerprint:
            raise InvalidArgument(violations=[("fingerprint", "is not that of the chunk stored under this key")])
        if known is None and self._descends_from_itself(offer):
            raise InvalidArgument(violations=[("parent_key", "leads back to the key itself")])
        return self._hold(offer.key, lease_id)

    def get(self, key: bytes) -> Entry | None:
        """Touches a chunk."""
        entry = self._entries.get(key)
        if entry is not None:
            self.shelf(entry.tier).touch(entry)
            self.accounts.touch(entry)
        return entry

    def count_read(self, tier: Tier | None, size: int) -> None:
        """A read found its chunk in `tier`, None: in neither; those above it were asked in vain."""
        for shelf in self.shelves:
            if shelf.tier is tier:
                shelf.counters.found(size)
                return
            shelf.counters.misses += bool(shelf.budget)

    # Coming, moving, going

    def place(self, offer: Offer) -> Decision | None:
        """The next step towards room for a chunk; None: it is too large, or all that is here must stay."""
        return self._eviction.place(offer)

    def could_ever_place(self, offer: Offer) -> bool:
        return self._eviction.could_ever_place(offer.size)

    def has_room(self, offer: Offer) -> bool:
        """Without anything being evicted?"""
        return any(shelf.has_room(offer.size) for shelf in self.shelves) and not self.accounts.would_exceed(offer)

    def free(self, entry: Entry) -> bool:
        """May it be evicted?"""
        return entry in self and self._eviction.free(entry)

    def promotion(self, entry: Entry) -> Decision | None:
        """How a chunk on disk may come up to memory; None: not now."""
        return self._eviction.promote(entry) if entry in self and entry.tier is Tier.DISK else None

    def peek(self, key: bytes) -> Entry | None:
        """A chunk, not touched."""
        return self._entries.get(key)

    def draft(self, offer: Offer, traits: Traits, tier: Tier, lease_id: str | None) -> Entry:
        """A chunk that is not here yet: its blob is to be written under this serial first."""
        self._serial += 1
        return Entry(offer, traits, self._serial, tier, owner=lease_id if offer.tail else None)

    def insert(self, entry: Entry, lease_id: str | None, now: float) -> None:
        """A chunk whose blob is whole. Raises NotFound: its lease has expired meanwhile."""
        if lease_id is not None:
            self.leases.live(lease_id, now)
        entry.hot = self._ghosts.take(entry.key)
        self._entries[entry.key] = entry
        self.shelf(entry.tier).add(entry)
        self.accounts.add(entry)
        self.children[entry.offer.continues] += 1
        self.qualities[entry.traits.quality] += 1
        self.raw_bytes += entry.traits.raw_bytes
        if lease_id is not None:
            self._pin(entry, lease_id)

    def restore(self, entry: Entry) -> bool:
        """A chunk found on disk at start, the least recently used first; False if another blob of its key is known."""
        self._serial = max(self._serial, entry.serial)
        if entry.key in self._entries:
            return False
        self.insert(entry, None, 0.0)
        return True

    def excess(self) -> Entry | None:
        """What is to go because the disk or a tenant has more than its budget, which may have shrunk since."""
        if not self.disk.has_room(0):
            return self._eviction.leaf(None, self.disk)
        return self._eviction.beyond_quota()

    def move(self, entry: Entry, tier: Tier) -> None:
        """The blob is now in the other tier."""
        self.shelf(entry.tier).discard(entry)
        entry.tier = tier
        self.shelf(tier).add(entry)

    def evict(self, entry: Entry) -> bool:
        """Forgets a chunk to make room; False if it is not here any more."""
        if not self.remove(entry):
            return False
        self.shelf(entry.tier).counters.evictions += 1
        if not entry.hot:
            self._ghosts.add(entry.key)
        return True

    def remove(self, entry: Entry) -> bool:
        """Forgets a chunk, whoever pins it, before its blob goes; False if it is not here any more."""
        if entry not in self:
            return False
        del self._entries[entry.key]
        self.shelf(entry.tier).discard(entry)
        self.accounts.discard(entry)
        _take(self.children, entry.offer.continues)
        _take(self.qualities, entry.traits.quality)
        self.raw_bytes -= entry.traits.raw_bytes
        for lease_id in entry.pins:
            self.leases[lease_id].pins.discard(entry.key)
        return True

    def release(self, lease_id: str) -> list[Entry] | None:
        """Ends a lease: the tails that went with it, whose blobs are to go; None if there was no such lease."""
        lease = self.leases.pop(lease_id)
        if lease is None:
            return None
        pinned = [self._entries[key] for key in lease.pins]
        for entry in pinned:
            entry.pins.discard(lease_id)
        return [entry for entry in pinned if entry.owner == lease_id and self.remove(entry)]

    def expire(self, now: float) -> list[Entry]:
        """Ends every lease that ran out: the tails that went with them, whose blobs are to go."""
        return [tail for lease_id in self.leases.late(now) for tail in self.release(lease_id) or ()]

    def shelf(self, tier: Tier) -> Shelf:
        return self.memory if tier is Tier.MEMORY else self.disk

    def _hold(self, key: bytes, lease_id: str | None) -> bool:
        """A request asks for a chunk: it is touched, pinned, and no longer on trial if this is not who put it."""
        entry = self.get(key)
        if entry is None:
            return False
        if lease_id is None or lease_id not in entry.pins:
            self.shelf(entry.tier).promote(entry)
        if lease_id is not None:
            self._pin(entry, lease_id)
        return True

    def _pin(self, entry: Entry, lease_id: str) -> None:
        entry.pins.add(lease_id)
        self.leases[lease_id].pins.add(entry.key)

    def _descends_from_itself(self, offer: Offer) -> bool:
        """Such a ring would have no leaf and never go. Only a chunk that comes after its children can close one."""
        ancestor = offer.parent if self.children[offer.tenant, offer.key] else b""
        while ancestor not in (b"", offer.key):
            known = self._entries.get(ancestor)
            ancestor = known.offer.parent if known and known.offer.tenant == offer.tenant else b""
        return ancestor == offer.key


T = TypeVar("T")


def _take(counter: Counter[T], item: T) -> None:
    """One less, and no zeros left behind."""
    counter[item] -= 1
    if not counter[item]:
        del counter[item]
