"""Batches as FlashInfer takes them: pages of requests one after the other, and prefixes that are read once.

A page is a block. Pure numpy: knows no KV, no device and no kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.prefixes import Cost, SharedPrefix, shared_prefixes
from kvmesh.types import BLOCK_TOKENS

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Pages:
    """Request i has queries [queries[i], queries[i + 1]) and pages `indices[indptr[i] : indptr[i + 1]]`."""

    queries: Int32
    indptr: Int32
    indices: Int32
    last_page_len: Int32

    @property
    def lengths(self) -> Int32:
        """Tokens of KV of each request."""
        return (np.diff(self.indptr) - 1) * np.int32(BLOCK_TOKENS) + self.last_page_len


@dataclass(frozen=True, slots=True)
class Tables:
    """Block tables one after the other: that of segment i is `blocks[first[i] : first[i + 1]]`."""

    blocks: Int32
    first: Int32

    def filled(self, block: int, count: int) -> Tables:
        """With `count` more tables of one block."""
        more = np.full(count, block, np.int32)
        return Tables(
            np.concatenate((self.blocks, more)),
            np.concatenate((self.first, self.first[-1] + np.arange(1, count + 1, dtype=np.int32))),
        )


def tables_of(segments: Sequence[Segment]) -> Tables:
    """Their whole tables, which costs more than all else here: once a batch."""
    blocks = np.fromiter(chain.from_iterable(segment.block_ids for segment in segments), np.int32)
    return Tables(blocks, _cumulated(len(segment.block_ids) for segment in segments))


def pages_of(segments: Sequence[Segment], tables: Tables, limit: int, skip: NDArray[np.int64] | None = None) -> Pages:
    """The pages that segments read, without the first `skip[i]` of each.

    Raises:
        IndexError: a segment lies outside its block table, or a block is not below `limit`. No kernel checks this.
    """
    ends: NDArray[np.int64] = np.array([segment.end for segment in segments], np.int64)
    first = np.zeros(len(segments), np.int64) if skip is None else skip
    end = (ends + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    if (np.diff(tables.first) < end).any():
        raise IndexError("a segment lies outside its block table")
    indptr = _cumulated(end - first)
    places = np.arange(indptr[-1]) + np.repeat(tables.first[:-1] + first - indptr[:-1], end - first)
    indices = tables.blocks[places]
    if len(indices) and not 0 <= indices.min() <= indices.max() < limit:
        raise IndexError("a block lies outside the pool")
    last = ((ends - 1) % BLOCK_TOKENS + 1).astype(np.int32)
    return Pages(_cumulated(segment.tokens for segment in segments), indptr, indices, last)


def places_of(segments: Sequence[Segment]) -> tuple[Int32, Int32]:
    """Of each new token the number of its segment and its position, `[tokens]`."""
    tokens = np.array([segment.tokens for segment in segments])
    starts = np.array([segment.start for segment in segments])
    offsets = np.arange(tokens.sum()) - np.repeat(tokens.cumsum() - tokens, tokens)
    requests = np.repeat(np.arange(len(segments), dtype=np.int32), tokens)
    return requests, (np.repeat(starts, tokens) + offsets).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Shared:
    """Prefixes of a batch as requests of their own: request p has the queries `rows[queries[p] : queries[p + 1]]`.

    `skip`: pages of each segment that prefixes cover. `levels`: numbers within `rows`, so split that a row appears
    once in each, for a row may have prefixes within prefixes.
    """

    pages: Pages
    rows: NDArray[np.int64]
    levels: tuple[NDArray[np.int64], ...]
    skip: NDArray[np.int64]


def shared_of(segments: Sequence[Segment], tables: Tables, cost: Cost) -> Shared | None:
    """The prefixes that decoding segments share, where that pays; None if nowhere."""
    full = np.array([s.start // BLOCK_TOKENS if s.tokens == 1 else 0 for s in segments], np.int32)
    prefixes = shared_prefixes(tables.blocks, tables.first[:-1], full, cost) if len(segments) > 1 else []
    return _shared(segments, prefixes) if prefixes else None


def _shared(segments: Sequence[Segment], prefixes: Sequence[SharedPrefix]) -> Shared:
    first_query = _cumulated(segment.tokens for segment in segments)
    depth, skip = np.zeros(len(segments), np.int64), np.zeros(len(segments), np.int64)
    levels: list[list[NDArray[np.int64]]] = []
    pairs = 0
    for prefix in prefixes:
        level = int(depth[prefix.members[0]])
        levels += [[]] * (level == len(levels))
        levels[level] = [*levels[level], np.arange(pairs, pairs + len(prefix.members))]
        pairs += len(prefix.members)
        depth[prefix.members] += 1
        skip[prefix.members] = prefix.end
    tables = [segments[prefix.members[0]].block_ids[prefix.first : prefix.end] for prefix in prefixes]
    pages = Pages(
        queries=_cumulated(len(prefix.members) for prefix in prefixes),
        indptr=_cumulated(map(len, tables)),
        indices=np.fromiter(chain.from_iterable(tables), np.int32),
        last_page_len=np.full(len(prefixes), BLOCK_TOKENS, np.int32),
    )
    rows = np.concatenate([first_query[prefix.members] for prefix in prefixes]).astype(np.int64)
    return Shared(pages, rows, tuple(np.concatenate(level) for level in levels), skip)


def _cumulated(counts: Iterable[int]) -> Int32:
    return np.cumsum([0, *counts], dtype=np.int32)
