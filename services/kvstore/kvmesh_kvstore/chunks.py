"""The nouns of the store: an offer, a stored chunk, a shelf of them. No blob, no time, no I/O."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum


class Tier(StrEnum):
    MEMORY = "memory"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Offer:
    """A chunk as its owner describes it; `parent` is empty for the first chunk of a prompt, `size` in bytes."""

    key: bytes
    fingerprint: str
    size: int
    parent: bytes = b""
    tail: bool = False


@dataclass(eq=False, slots=True)
class Entry:
    """A stored chunk. `serial` tells its blob from an earlier one of the same key."""

    offer: Offer
    serial: int
    tier: Tier
    pins: set[str] = field(default_factory=set)
    """The leases that hold it."""
    owner: str | None = None
    """The lease that a tail goes with."""
    readers: int = 0

    @property
    def key(self) -> bytes:
        return self.offer.key

    @property
    def size(self) -> int:
        return self.offer.size


@dataclass(slots=True)
class Shelf:
    """The accounts of one tier: its entries in order of last use, oldest first."""

    budget: int
    used: int = 0
    entries: OrderedDict[bytes, Entry] = field(default_factory=OrderedDict)

    def add(self, entry: Entry) -> None:
        self.entries[entry.key] = entry
        self.used += entry.size

    def discard(self, entry: Entry) -> None:
        del self.entries[entry.key]
        self.used -= entry.size

    def has_room(self, size: int) -> bool:
        return self.used + size <= self.budget
