"""The accounts of the store: what lies in each tier, what each tenant has, and in which order chunks should go.

Pure. A shelf has the two queues of S3-FIFO (Yang, Zhang, Qiu, Yue & Rashmi, SOSP 2023): a new chunk is on trial until
a second request asks for it, and those on trial may take TRIAL_SHARE of the tier before they give way to each other.
So a chunk that is seen once displaces little of what is known to be wanted. Within a queue the least recently used goes
first, because a prefix is touched after its continuations. Who must stay is for `eviction` to say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from kvmesh.types import TierCounts
from kvmesh_kvstore.chunks import Entry, Offer, Tier

TRIAL_SHARE = 0.1
GHOSTS = 65_536


@dataclass(slots=True)
class Shelf:
    """One tier. `budget` and `used` in bytes."""

    tier: Tier
    budget: int
    used: int = 0
    counters: TierCounts = field(default_factory=TierCounts)
    trial: OrderedDict[bytes, Entry] = field(default_factory=OrderedDict)
    main: OrderedDict[bytes, Entry] = field(default_factory=OrderedDict)
    _trial_used: int = 0

    def __len__(self) -> int:
        return len(self.trial) + len(self.main)

    def __contains__(self, entry: Entry) -> bool:
        return self._queue(entry).get(entry.key) is entry

    def __iter__(self) -> Iterator[Entry]:
        """In the order of going."""
        trial_first = self._trial_used > TRIAL_SHARE * self.budget
        queues = (self.trial, self.main) if trial_first else (self.main, self.trial)
        return chain.from_iterable(queue.values() for queue in queues)

    def add(self, entry: Entry) -> None:
        self._queue(entry)[entry.key] = entry
        self.used += entry.size
        self._trial_used += 0 if entry.hot else entry.size
        self.counters.admissions += 1

    def discard(self, entry: Entry) -> None:
        del self._queue(entry)[entry.key]
        self.used -= entry.size
        self._trial_used -= 0 if entry.hot else entry.size

    def touch(self, entry: Entry) -> None:
        self._queue(entry).move_to_end(entry.key)

    def promote(self, entry: Entry) -> None:
        """Out of its trial, if it is on one."""
        if not entry.hot:
            del self.trial[entry.key]
            self._trial_used -= entry.size
            entry.hot = True
            self.main[entry.key] = entry

    def has_room(self, size: int) -> bool:
        return self.used + size <= self.budget

    def _queue(self, entry: Entry) -> OrderedDict[bytes, Entry]:
        return self.main if entry.hot else self.trial


@dataclass(slots=True)
class Account:
    """What one tenant has in all tiers together, the least recently used first."""

    used: int = 0
    entries: OrderedDict[bytes, Entry] = field(default_factory=OrderedDict)

    def __iter__(self) -> Iterator[Entry]:
        """In the order of going: those on trial first."""
        entries = self.entries.values()
        return chain((entry for entry in entries if not entry.hot), (entry for entry in entries if entry.hot))


class Accounts:
    """By tenant; `quota`: the bytes that each may have, None for no limit."""

    def __init__(self, quota: int | None = None) -> None:
        self.quota = quota
        self._accounts: dict[bytes, Account] = {}

    def __iter__(self) -> Iterator[tuple[bytes, Account]]:
        return iter(self._accounts.items())

    def add(self, entry: Entry) -> None:
        account = self._accounts.setdefault(entry.offer.tenant, Account())
        account.entries[entry.key] = entry
        account.used += entry.size

    def discard(self, entry: Entry) -> None:
        account = self._accounts[entry.offer.tenant]
        del account.entries[entry.key]
        account.used -= entry.size
        if not account.entries:
            del self._accounts[entry.offer.tenant]

    def touch(self, entry: Entry) -> None:
        self._accounts[entry.offer.tenant].entries.move_to_end(entry.key)

    def of(self, tenant: bytes) -> Account:
        return self._accounts.get(tenant, Account())

    def would_exceed(self, offer: Offer) -> bool:
        return self.quota is not None and self.of(offer.tenant).used + offer.size > self.quota

    def heaviest_first(self, offer: Offer | None) -> list[Account]:
        """The accounts as they would be with the chunk on offer, the largest first."""

        def weight(tenant: bytes) -> int:
            return self._accounts[tenant].used + (offer.size if offer and tenant == offer.tenant else 0)

        return [self._accounts[tenant] for tenant in sorted(self._accounts, key=weight, reverse=True)]


class Ghosts:
    """Keys of chunks that left while on trial, the last GHOSTS of them: one that comes back is no stranger."""

    def __init__(self, capacity: int = GHOSTS) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._capacity = capacity

    def add(self, key: bytes) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._capacity:
            self._keys.popitem(last=False)

    def take(self, key: bytes) -> bool:
        """Was it here? It is no longer."""
        return key in self._keys and self._keys.pop(key) is None
