"""Blocks of paged KV: who holds them, and which of them can be reused by content.

Reference counts, copy-on-write and prefix reuse as in PagedAttention (Kwon et al., arXiv 2309.06180, §4.3–4.4). A block
that nobody holds keeps its content hash until it is handed out again, so eviction needs no code of its own. Knows no
tensors, no requests and no tokens: a block is a number, its content a hash.

    free list:  [ never hashed, or forgotten | least recently released … most recently released ]
                  ^ handed out first                                         reusable by hash the longest
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvmesh.errors import KvmeshError


class OutOfBlocks(KvmeshError):
    """More blocks were asked for than are free."""


class BlockPool:
    """`blocks` blocks, numbered from 0."""

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise ValueError("a block pool needs at least one block")
        self._references = [0] * blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        """Blocks that nobody holds, reusable ones included."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and whose content can be reused."""
        return sum(1 for block in self._hash_of if not self._references[block])

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks of unspecified content, forgetting the least recently released hashes first.

        Raises:
            OutOfBlocks: fewer are free; nothing was taken.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked, {len(self._free)} free")
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        if self._hash_of:
            for block in taken:
                self._forget(block)
        return taken

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest leading run of `hashes` that the pool has; takes no reference."""
        matched = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            matched.append(block)
        return matched

    def free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` count as free now, and would not once they are shared."""
        return sum(1 for block in blocks if not self._references[block])

    def share(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each block."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each block of a table; its deepest blocks are reused first."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"block {block} is not held")
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def shared(self, block: int) -> bool:
        """True if somebody else holds the block too: it must be copied before it is written."""
        return self._references[block] > 1

    def publish(self, block: int, digest: bytes) -> None:
        """Makes a full, final block reusable by content. The first block of a content keeps the name."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def _forget(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> list[str]:
        """Compares the counts with the block `tables` of everybody who holds blocks; empty is good."""
        held = [0] * self.total
        for table in tables:
            for block in table:
                held[block] += 1
        problems = [
            f"block {block}: {count} references, {held[block]} holders"
            for block, count in enumerate(self._references)
            if count != held[block]
        ]
        unheld = {block for block, count in enumerate(self._references) if not count}
        if unheld != set(self._free):
            problems.append(f"free list differs from the unheld blocks in {sorted(unheld ^ set(self._free))}")
        if {digest: block for block, digest in self._hash_of.items()} != self._block_of:
            problems.append("block hashes are not one to one")
        return problems
