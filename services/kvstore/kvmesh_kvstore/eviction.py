"""Which chunk makes way for another: leaf-first, on trial before proven, least recently used, over two tiers.

Pure: looks at the shelves, decides one step at a time and changes nothing. A chunk may be evicted only if no lease pins
it, nobody reads it and no chunk of its tenant names it as parent, for one without its prefix is of no use to anybody.
Demotion to disk loses nothing, so it may move any chunk; unpinned ones first, the others are about to be fetched.

With a quota, a tenant that would exceed it gives of its own, and where room is short nevertheless the tenant who has
most gives first (max-min fairness): flooding the store costs the flooder, and nobody below its quota while the quotas
of those present fit into the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from kvmesh_kvstore.chunks import Entry, Offer, Tier
from kvmesh_kvstore.shelves import Accounts, Shelf


@dataclass(frozen=True, slots=True)
class Place:
    """There is room in this tier."""

    tier: Tier


@dataclass(frozen=True, slots=True)
class Demote:
    """Move this one from memory to disk, where there is room."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Evict:
    entry: Entry


Decision = Place | Demote | Evict


class Eviction:
    """`children` counts, for each tenant and key, his chunks that name it as parent."""

    def __init__(
        self, memory: Shelf, disk: Shelf, accounts: Accounts, children: Mapping[tuple[bytes, bytes], int]
    ) -> None:
        self._memory, self._disk, self._accounts, self._children = memory, disk, accounts, children

    def place(self, offer: Offer) -> Decision | None:
        """The next step towards room for a chunk; None: no tier or quota is that large, or what is here must stay."""
        if not self.could_ever_place(offer.size):
            return None
        if self._accounts.would_exceed(offer):
            return _evict(self._first_free(self._accounts.of(offer.tenant)))
        if offer.size <= self._memory.budget:
            return Place(Tier.MEMORY) if self._memory.has_room(offer.size) else self._relieve_memory(offer)
        return Place(Tier.DISK) if self._disk.has_room(offer.size) else _evict(self.leaf(offer, self._disk))

    def could_ever_place(self, size: int) -> bool:
        """Is some tier that large, and the quota?"""
        quota = self._accounts.quota
        return size <= max(self._memory.budget, self._disk.budget) and (quota is None or size <= quota)

    def promote(self, entry: Entry) -> Decision | None:
        """How a chunk on disk that was just read can come up without anything being lost: room, or a swap with one."""
        if self._memory.has_room(entry.size):
            return Place(Tier.MEMORY)
        victim = next((e for e in self._memory if not e.pins), None)
        if victim is None:
            return None
        fits_up = self._memory.has_room(entry.size - victim.size)
        fits_down = self._disk.has_room(victim.size - entry.size)
        return Demote(victim) if fits_up and fits_down else None

    def leaf(self, offer: Offer | None, *shelves: Shelf) -> Entry | None:
        """The first to go of what nothing needs on these shelves, where room is wanted for `offer`."""
        if self._accounts.quota is None:
            return self._first_free(chain.from_iterable(shelves))
        accounts = chain.from_iterable(self._accounts.heaviest_first(offer))
        tiers = {shelf.tier for shelf in shelves}
        return self._first_free(entry for entry in accounts if entry.tier in tiers)

    def beyond_quota(self) -> Entry | None:
        """The first to go of a tenant that has more than its quota."""
        quota = self._accounts.quota
        above = (account for _, account in self._accounts if quota is not None and account.used > quota)
        return self._first_free(chain.from_iterable(above))

    def free(self, entry: Entry) -> bool:
        """Does nothing need it?"""
        return not entry.pins and not entry.readers and not self._children.get(entry.continued_as)

    def _first_free(self, entries: Iterable[Entry]) -> Entry | None:
        return next(filter(self.free, entries), None)

    def _relieve_memory(self, offer: Offer) -> Decision | None:
        unpinned = (entry for entry in self._memory if not entry.pins)
        victim = next(unpinned, None) or next(iter(self._memory))
        if self._disk.has_room(victim.size):
            return Demote(victim)
        shelves = (self._disk, self._memory) if victim.size <= self._disk.budget else (self._memory,)
        return _evict(self.leaf(offer, *shelves))


def _evict(entry: Entry | None) -> Evict | None:
    return Evict(entry) if entry else None
