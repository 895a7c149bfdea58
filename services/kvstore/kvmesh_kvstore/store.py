"""Which chunks are here, in which tier and who holds them.

Pure and synchronous: neither asyncio, grpc nor a blob; time is an argument, in seconds. Whoever owns the blobs asks
`place()` what to do, does it, reports it here, and asks again until there is room.

Ownership: a chunk is pinned by any number of leases; a tail is owned by one and goes with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvmesh.errors import InvalidArgument
from kvmesh_kvstore.chunks import Entry, Offer, Shelf, Tier
from kvmesh_kvstore.eviction import Decision, Eviction
from kvmesh_kvstore.leases import LeaseTable


@dataclass(slots=True)
class Counters:
    """Of reads: hits and misses, damaged ones among the misses. Of room: evictions, demotions and promotions."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    evictions: int = 0
    demotions: int = 0
    promotions: int = 0


class ChunkStore:
    """Budgets in bytes of bitstreams; a budget of 0 turns the tier off."""

    def __init__(self, memory_bytes: int, disk_bytes: int = 0, leases: LeaseTable | None = None) -> None:
        self.memory, self.disk = Shelf(memory_bytes), Shelf(disk_bytes)
        self.leases = LeaseTable() if leases is None else leases
        self.counters = Counters()
        self._entries: dict[bytes, Entry] = {}
        self._children: Counter[bytes] = Counter()
        self._eviction = Eviction(self.memory, self.disk, self._children)
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

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
            self._shelf(entry.tier).entries.move_to_end(key)
        return entry

    # Coming, moving, going

    def place(self, size: int) -> Decision | None:
        """The next step towards room for `size` bytes; None: no tier is that large, or all that is here must stay."""
        return self._eviction.place(size)

    def promotion(self, entry: Entry) -> Decision | None:
        """How a chunk on disk may come up to memory; None: not now."""
        return self._eviction.promote(entry) if entry in self and entry.tier is Tier.DISK else None

    def draft(self, offer: Offer, tier: Tier, lease_id: str | None) -> Entry:
        """A chunk that is not here yet: its blob is to be written under this serial first."""
        self._serial += 1
        return Entry(offer, self._serial, tier, owner=lease_id if offer.tail else None)

    def insert(self, entry: Entry, lease_id: str | None, now: float) -> None:
        """A chunk whose blob is whole. Raises NotFound: its lease has expired meanwhile."""
        if lease_id is not None:
            self.leases.live(lease_id, now)
        self._entries[entry.key] = entry
        self._shelf(entry.tier).add(entry)
        self._children[entry.offer.parent] += 1
        self._hold(entry.key, lease_id)

    def restore(self, entry: Entry) -> bool:
        """A chunk found on disk at start, the least recently used first; False if another blob of its key is known."""
        self._serial = max(self._serial, entry.serial)
        if entry.key in self._entries:
            return False
        self.insert(entry, None, 0.0)
        return True

    def excess(self) -> Entry | None:
        """What is to go because the disk holds more than its budget, which may have shrunk since."""
        return None if self.disk.has_room(0) else self._eviction.leaf(self.disk)

    def move(self, entry: Entry, tier: Tier) -> None:
        """The blob is now in the other tier."""
        self._shelf(entry.tier).discard(entry)
        entry.tier = tier
        self._shelf(tier).add(entry)

    def remove(self, entry: Entry) -> bool:
        """Forgets a chunk, whoever pins it, before its blob goes; False if it is not here any more."""
        if entry not in self:
            return False
        del self._entries[entry.key]
        self._shelf(entry.tier).discard(entry)
        self._disown(entry.offer.parent)
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

    # Checking

    def check_integrity(self) -> list[str]:
        """What is wrong with the books; empty is good."""
        return [*self._shelf_errors(), *self._entry_errors(), *self._children_errors()]

    def _shelf_errors(self) -> Iterator[str]:
        for tier in Tier:
            shelf = self._shelf(tier)
            if shelf.used != sum(entry.size for entry in shelf.entries.values()):
                yield f"{tier}: {shelf.used} bytes in the books are not those of its chunks"
            if shelf.used > shelf.budget:
                yield f"{tier}: {shelf.used} bytes are more than the budget of {shelf.budget}"
        if len(self._entries) != len(self.memory.entries) + len(self.disk.entries):
            yield "some chunk is not in exactly one tier"

    def _entry_errors(self) -> Iterator[str]:
        holders = self.leases.holders()
        if stray := holders.keys() - self._entries.keys():
            yield f"leases pin {len(stray)} chunks that are not here"
        for key, entry in self._entries.items():
            name = key.hex()[:12]
            if self._shelf(entry.tier).entries.get(key) is not entry:
                yield f"{name} is not in {entry.tier}"
            if entry.pins != holders.get(key, set()):
                yield f"{name} is pinned by other leases than say so"
            if entry.offer.tail != (entry.owner is not None) or (entry.owner and entry.owner not in entry.pins):
                yield f"{name} is a tail that no lease owns"
            if entry.readers < 0:
                yield f"{name} has {entry.readers} readers"

    def _children_errors(self) -> Iterator[str]:
        if self._children != Counter(entry.offer.parent for entry in self._entries.values()):
            yield "children counts are not those of the chunks"

    def _hold(self, key: bytes, lease_id: str | None) -> bool:
        entry = self.get(key)
        if entry is not None and lease_id is not None:
            entry.pins.add(lease_id)
            self.leases[lease_id].pins.add(key)
        return entry is not None

    def _descends_from_itself(self, offer: Offer) -> bool:
        """Such a ring would have no leaf and never go. Only a chunk that comes after its children can close one."""
        ancestor = offer.parent if self._children[offer.key] else b""
        while ancestor not in (b"", offer.key):
            known = self._entries.get(ancestor)
            ancestor = known.offer.parent if known else b""
        return ancestor == offer.key

    def _disown(self, parent: bytes) -> None:
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]

    def _shelf(self, tier: Tier) -> Shelf:
        return self.memory if tier is Tier.MEMORY else self.disk
