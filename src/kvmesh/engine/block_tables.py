"""The block tables of all sequences: reserved, grown, copied on write, published, given up and swapped.

PagedAttention's memory management (vLLM, arXiv 2309.06180, §4.2-4.5). Knows neither who is to run next nor what a token
is: `scheduler.py` does. Pure: no torch, no clock, no threads.
"""

from __future__ import annotations

from collections import deque

from kvmesh.engine.cache.block_pool import BlockPool
from kvmesh.engine.cache.swap import SwapSpace
from kvmesh.engine.iteration import Iteration, blocks_for
from kvmesh.engine.sequence import Group, Saved, Sequence
from kvmesh.types import BLOCK_TOKENS


class BlockTables:
    """Every request and the blocks that its sequences hold."""

    def __init__(self, pool: BlockPool, swap: SwapSpace) -> None:
        self.pool = pool
        self.swap = swap
        self.groups: dict[str, Group] = {}
        self.waiting: deque[Sequence] = deque()
        self.loading: dict[str, Sequence] = {}
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.swaps = 0
        self.queried_tokens = 0
        self.hit_tokens = 0

    def _hits(self, sequence: Sequence) -> list[int]:
        return self.pool.match(sequence.block_hashes(sequence.reusable))

    def _reserve(self, sequence: Sequence, iteration: Iteration) -> None:
        hits = self._hits(sequence)
        self.pool.share(hits)
        sequence.blocks = hits + self.pool.allocate(blocks_for(len(sequence.tokens)) - len(hits))
        sequence.computed = len(hits) * BLOCK_TOKENS
        sequence.published = len(hits)
        self.queried_tokens += sequence.reusable
        self.hit_tokens += sequence.computed
        if sequence.saved and sequence.saved.tokens > sequence.computed:
            iteration.restores.append((sequence, sequence.computed))
            sequence.computed = sequence.saved.tokens
        else:
            self.restored(sequence)

    def _make_room(self, sequence: Sequence, tokens: int, iteration: Iteration) -> bool:
        """Sees that the next tokens have blocks of their own; False if the sequence itself had to give way."""
        while not self._writable(sequence, tokens, iteration):
            victim = next((one for one in reversed(self.running) if not _in_use(one, iteration)), None)
            if victim is None:
                return False
            self._preempt(victim, iteration)
            if sequence not in self.running:
                return False
        return True

    def _writable(self, sequence: Sequence, tokens: int, iteration: Iteration) -> bool:
        first = sequence.computed // BLOCK_TOKENS
        grows = max(0, blocks_for(sequence.computed + tokens) - len(sequence.blocks))
        copies = first < len(sequence.blocks) and self.pool.shared(sequence.blocks[first])
        if grows + copies > self.pool.free:
            return False
        if copies:
            (fresh,) = self.pool.allocate(1)
            iteration.copies.append((sequence.blocks[first], fresh))
            self.pool.release([sequence.blocks[first]])
            sequence.blocks[first] = fresh
        sequence.blocks += self.pool.allocate(grows)
        return True

    def _preempt(self, sequence: Sequence, iteration: Iteration) -> None:
        """A beam search gives way as a whole and starts anew: beams that wait for each other could wait for ever."""
        group = sequence.group
        if not group.beams:
            self._save(sequence, iteration)
        for one in group.sequences if group.beams else [sequence]:
            self.running.remove(one)
            self.pool.release(one.blocks)
            one.blocks, one.computed, one.published = [], 0, 0
        self.waiting.appendleft(group.restart() if group.beams else sequence)
        self.preemptions += 1

    def _save(self, sequence: Sequence, iteration: Iteration) -> None:
        """Its KV to host memory, if that pays. What was to be restored in this very iteration is still there."""
        iteration.restores = [restore for restore in iteration.restores if restore[0] is not sequence]
        if sequence.saved is None and self.swap.take(sequence.computed):
            sequence.saved = Saved(sequence.computed)
            iteration.saves.append((sequence, tuple(sequence.blocks)))
            self.swaps += 1

    def _publish(self, sequence: Sequence) -> None:
        full = sequence.computed // BLOCK_TOKENS
        if full > sequence.published:
            hashes = sequence.block_hashes(sequence.computed)
            for position in range(sequence.published, full):
                self.pool.publish(sequence.blocks[position], hashes[position])
            sequence.published = full

    def restored(self, sequence: Sequence) -> None:
        """Its KV is no longer in host memory, if it was."""
        if sequence.saved:
            self.swap.give_back(sequence.saved.tokens)
            sequence.saved = None

    def _retire(self, sequence: Sequence) -> None:
        group = sequence.group
        self.pool.release(sequence.blocks)
        group.sequences.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        if not group.sequences:
            del self.groups[group.request.request_id]

    def check_integrity(self) -> list[str]:
        """Pool counts against every block table, and every sequence in exactly one place."""
        alive = [sequence for group in self.groups.values() for sequence in group.sequences]
        places = [*self.waiting, *self.loading.values(), *self.running]
        problems = self.pool.check_integrity([sequence.blocks for sequence in alive])
        if sorted(map(id, alive)) != sorted(map(id, places)):
            problems.append(f"{len(alive)} live sequences, {len(places)} in waiting, loading and running")
        return problems


def _in_use(sequence: Sequence, iteration: Iteration) -> bool:
    """True if the iteration needs its blocks; beams come and go together."""
    together = sequence.group.sequences if sequence.group.beams else [sequence]
    return any(one in iteration.sequences for one in together)
