"""Which sequences of a batch share a prefix, found from their block tables: a tree of any depth.

Equal block ids mean equal KV, so nothing else needs to be told. Attention to a shared prefix is computed once for all
who share it, as a product of matrices, and merged with each one's own part by log-sum-exp (Hydragen, arXiv 2402.05099,
sections 3.1 to 3.3). Knows no KV; pure numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS = 8
"""Queries that one load of a key serves in the kernel."""
MERGE_BLOCKS = 6
"""What merging the parts of one query costs, in blocks of keys that might as well be loaded (bench/hydragen.py)."""
CHUNK_BLOCKS = 1.0
"""What keeping and adding another part of one query costs, likewise."""


@dataclass(frozen=True, slots=True)
class Cost:
    """When sharing pays: `group` query heads of each sequence read one KV head.

    Prefixes begin and end at multiples of `multiple` blocks, and so many of a sequence's later blocks make a part that
    costs `chunk_blocks` to merge.
    """

    group: int = 1
    merge_blocks: int = MERGE_BLOCKS
    multiple: int = 1
    chunk_blocks: float = 0.0

    def pays(self, members: int, blocks: int, later: int = 0) -> bool:
        """True if what is not loaded again, eight queries at a time, is more than the merging costs; `later`: blocks of
        all members behind the prefix."""
        loads = members * -(-self.group // ROWS) - -(-members * self.group // ROWS)
        parts = later / self.multiple * self.chunk_blocks
        return loads * blocks > self.group * (members * self.merge_blocks + parts)


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Blocks [first, end) of the tables of all `members`, which number rows of what was asked about."""

    members: NDArray[np.int64]
    first: int
    end: int


def shared_prefixes(
    tables: NDArray[np.int32], first_block: NDArray[np.int32], full: NDArray[np.int32], cost: Cost
) -> list[SharedPrefix]:
    """The prefixes that pay, outer ones first.

    Sequence i has `full[i]` blocks that are computed and never written again, from `tables[first_block[i]]` on.
    """
    eligible = np.flatnonzero(full)
    firsts = tables[first_block[eligible]].tolist()
    if len(set(firsts)) == len(firsts):
        return []
    lengths = full[eligible]
    columns = np.arange(lengths.max())
    positions = first_block[eligible, None] + columns
    grid = tables[np.minimum(positions, len(tables) - 1)]
    # Beyond its end no sequence equals another.
    grid = np.where(columns < lengths[:, None], grid, -1 - np.arange(len(eligible), dtype=np.int32)[:, None])
    found = _descend(grid, lengths, np.arange(len(eligible)), 0, 0, cost)
    return [SharedPrefix(eligible[prefix.members], prefix.first, prefix.end) for prefix in found]


def _descend(
    grid: NDArray[np.int32], lengths: NDArray[np.int32], rows: NDArray[np.int64], first: int, column: int, cost: Cost
) -> Iterator[SharedPrefix]:
    """Prefixes among `rows`, equal before `column`, whose blocks before `first` are covered by an outer prefix."""
    for members in _groups(grid[rows, column], rows):
        same = (grid[members, column:] == grid[members[0], column:]).all(axis=0)
        parted = column + (int(same.argmin()) if not same.all() else len(same))
        end = parted // cost.multiple * cost.multiple
        start = first
        if cost.pays(len(members), end - first, int((lengths[members] - end).sum())):
            yield SharedPrefix(members, first, end)
            start = end
        if parted < grid.shape[1]:
            yield from _descend(grid, lengths, members, start, parted, cost)


def _groups(keys: NDArray[np.int32], rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """`rows` of equal keys, of two or more."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    return [group for group in np.split(rows[order], ends) if len(group) > 1]
