"""Which worker probably has the KV of which prompt prefix.

An estimate for placement, never for correctness: built from what was sent where, it forgets the least recently used
blocks of a worker, and everything of a worker that restarted. Pure; does not know what the KV is or where it lies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvmesh.types import BLOCK_TOKENS


def prefix_hashes(tokens: Sequence[int], salt: str = "", step: int = BLOCK_TOKENS) -> list[int]:
    """Chain of 64-bit hashes over each full `step` tokens. Cheap and not collision-proof: an estimate needs no more."""
    chain, parent = [], hash(salt)
    for start in range(0, len(tokens) - step + 1, step):
        parent = hash((parent, *tokens[start : start + step]))
        chain.append(parent)
    return chain


@dataclass(slots=True)
class _Prefixes:
    epoch: int
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class PrefixIndex:
    """Per worker, an LRU set of at most `capacity` block hashes, each of `block_tokens` tokens."""

    capacity: int = 65_536
    block_tokens: int = BLOCK_TOKENS
    _workers: dict[str, _Prefixes] = field(default_factory=dict)

    def match(self, worker_id: str, epoch: int, hashes: Sequence[int]) -> int:
        """How many leading blocks the worker probably has."""
        known = self._workers.get(worker_id)
        if known is None or known.epoch != epoch:
            return 0
        for matched, block in enumerate(hashes):
            if block not in known.blocks:
                return matched
        return len(hashes)

    def record(self, worker_id: str, epoch: int, hashes: Sequence[int]) -> None:
        """The worker has these blocks now. The first is the most recently used: a prefix outlives what follows it."""
        known = self._workers.get(worker_id)
        if known is None or known.epoch != epoch:
            known = self._workers[worker_id] = _Prefixes(epoch)
        for block in reversed(hashes):
            known.blocks[block] = None
            known.blocks.move_to_end(block)
        while len(known.blocks) > self.capacity:
            known.blocks.popitem(last=False)

    def forget(self, worker_id: str) -> None:
        """The worker is gone. Idempotent."""
        self._workers.pop(worker_id, None)

    def __len__(self) -> int:
        return sum(len(known.blocks) for known in self._workers.values())
