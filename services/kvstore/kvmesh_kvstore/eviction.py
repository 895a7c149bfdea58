"""Which chunk makes way for another: leaf-first LRU over two tiers.

Pure: looks at the shelves, decides one step at a time and changes nothing. A chunk may be evicted only if no lease pins
it, nobody reads it and no stored chunk names it as parent, for a chunk without its prefix is of no use to anybody.
Demotion to disk loses nothing, so it may move any chunk; unpinned ones first, the others are about to be fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmesh_kvstore.chunks import Entry, Shelf, Tier


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
    """`children` counts, for each key, the stored chunks that name it as parent."""

    def __init__(self, memory: Shelf, disk: Shelf, children: Mapping[bytes, int]) -> None:
        self._memory, self._disk, self._children = memory, disk, children

    def place(self, size: int) -> Decision | None:
        """The next step towards room for `size` bytes; None: no tier is that large, or what is here must stay."""
        if size <= self._memory.budget:
            return Place(Tier.MEMORY) if self._memory.has_room(size) else self._relieve_memory()
        if size <= self._disk.budget:
            return Place(Tier.DISK) if self._disk.has_room(size) else _evict(self.leaf(self._disk))
        return None

    def promote(self, entry: Entry) -> Decision | None:
        """How a chunk on disk that was just read can come up without anything being lost: room, or a swap with one."""
        if self._memory.has_room(entry.size):
            return Place(Tier.MEMORY)
        victim = next((e for e in self._memory.entries.values() if not e.pins), None)
        if victim is None:
            return None
        fits_up = self._memory.has_room(entry.size - victim.size)
        fits_down = self._disk.has_room(victim.size - entry.size)
        return Demote(victim) if fits_up and fits_down else None

    def leaf(self, shelf: Shelf) -> Entry | None:
        """The least recently used chunk of the shelf that nothing needs."""
        return next((entry for entry in shelf.entries.values() if self._free(entry)), None)

    def _relieve_memory(self) -> Decision | None:
        unpinned = (entry for entry in self._memory.entries.values() if not entry.pins)
        victim = next(unpinned, None) or next(iter(self._memory.entries.values()))
        if self._disk.has_room(victim.size):
            return Demote(victim)
        below = self.leaf(self._disk) if victim.size <= self._disk.budget else None
        return _evict(below or self.leaf(self._memory))

    def _free(self, entry: Entry) -> bool:
        return not entry.pins and not entry.readers and not self._children.get(entry.key)


def _evict(entry: Entry | None) -> Evict | None:
    return Evict(entry) if entry else None
