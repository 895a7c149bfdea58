"""Attention on CUDA by FlashInfer: append, paged decode and prefill, and prefixes that are read once.

Batches of single tokens go through its decode kernels, all others through its prefill kernels. Where decoding
sequences share a prefix and that pays, the prefix is attended to once for all of them, and merged with each one's own
part by log-sum-exp (Hydragen, arXiv 2402.05099; FlashInfer, arXiv 2501.01005). Knows no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvmesh.engine.attention.flashinfer_api import FlashInfer
from kvmesh.engine.attention.flashinfer_pool import PagePool
from kvmesh.engine.attention.flashinfer_tables import Pages, Shared, Tables, pages_of, places_of, shared_of, tables_of
from kvmesh.engine.attention.flashinfer_wrappers import CAPTURED_ROWS, Buffers, Heads, Wrappers
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.prefixes import Cost
from kvmesh.engine.cuda.staging import to_device

CAPTURED_PAGES = 1 << 20
"""The most pages of a captured step."""
SAVED_BYTES = 128 << 20
"""What a prefix must save a layer to read, 40 us on an H100, to be worth a step that no graph replays and three more
kernels. An estimate: no GPU has measured it."""


@dataclass(frozen=True, slots=True)
class SavedBytes(Cost):
    """Sharing pays by the KV that is not read again; `block_bytes`: one block of one layer."""

    block_bytes: int = 1 << 16
    least: int = SAVED_BYTES

    def pays(self, members: int, blocks: int, later: int = 0) -> bool:
        return (members - 1) * blocks * self.block_bytes >= self.least


@dataclass(frozen=True, slots=True)
class Append:
    """Where new tokens go: arguments of FlashInfer's append, on the device."""

    requests: Tensor
    positions: Tensor
    indices: Tensor
    indptr: Tensor
    last_page_len: Tensor


@dataclass(frozen=True, slots=True)
class _Prefixes:
    """A planned wrapper, the rows it attends for, and of each level the rows and their places among those."""

    wrapper: Any
    rows: slice | Tensor
    levels: tuple[tuple[slice | Tensor, slice | Tensor], ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    append: Append
    own: dict[int | None, Any]
    """A planned wrapper by window."""
    prefixes: _Prefixes | None = None
    """For layers without a window."""


class FlashInferAttention:
    """Implements `Attention`; `windows` has one entry per layer. `sharing`: when a prefix is read once; None: never."""

    def __init__(
        self,
        pool: PagePool,
        windows: Sequence[int | None],
        heads: int,
        flashinfer: FlashInfer,
        sharing: Cost | None,
    ) -> None:
        self._pool, self._windows, self._sharing = pool, windows, sharing
        layout, device = pool.layout, pool.data.device
        shape = Heads(heads, layout.kv_heads, layout.head_dim, pool.dtype, pool.data.dtype)
        self._flashinfer, self._wrappers = flashinfer, Wrappers(shape, device, flashinfer)
        self._buffers: Buffers | None = None
        self._plan: _Plan | None = None
        self._seen: tuple[Sequence[Segment], Tables, Shared | None] | None = None

    def plan(self, segments: Sequence[Segment]) -> None:
        self._fence(segments)
        tables, shared = self._tables(segments)
        pages = pages_of(segments, tables, self._pool.blocks)
        own = pages_of(segments, tables, self._pool.blocks, shared.skip) if shared else pages
        single = all(segment.tokens == 1 for segment in segments)
        attend = self._wrappers.decode if single else self._wrappers.chunks
        self._plan = _Plan(
            append_of(segments, pages, self._pool.data.device),
            {window: attend(own if window is None else pages, window) for window in set(self._windows)},
            self._prefixes(shared) if shared else None,
        )

    def plan_captured(self, segments: Sequence[Segment], rows: int) -> bool:
        """As `plan`, for a graph of `rows` rows, which `segments` fill up from the first; False if `plan` is better."""
        if rows > CAPTURED_ROWS or any(segment.tokens != 1 for segment in segments):
            return False
        tables, shared = self._tables(segments)
        if shared or len(tables.blocks) > CAPTURED_PAGES - rows:
            return False
        filling = [Segment(0, 1, (self._pool.scratch,))] * (rows - len(segments))
        tables = tables.filled(self._pool.scratch, len(filling))
        pages = pages_of([*segments, *filling], tables, self._pool.blocks + 1)
        self._fence(segments)
        device = self._pool.data.device
        self._buffers = buffers = self._buffers or Buffers.empty(CAPTURED_ROWS, CAPTURED_PAGES, device)
        _, positions = places_of([*segments, *filling])
        buffers.positions[:rows].copy_(to_device(torch.from_numpy(positions), device))
        captured = (rows, buffers)
        own = {window: self._wrappers.decode(pages, window, captured) for window in set(self._windows)}
        self._plan = _Plan(_append_from(buffers, rows), own)
        return True

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan, cache, window = self._plan, self._pool.data[layer], self._windows[layer]
        assert plan is not None
        a = plan.append
        k, v = k.to(cache.dtype), v.to(cache.dtype)
        self._flashinfer.append_paged_kv_cache(
            k, v, a.requests, a.positions, cache, a.indices, a.indptr, a.last_page_len, "NHD"
        )
        own = plan.own[window]
        if plan.prefixes is None or window is not None:
            out: Tensor = own.run(q, cache)
            return out
        return self._merged(plan.prefixes, own, q, cache)

    def _merged(self, prefixes: _Prefixes, own: Any, q: Tensor, cache: Tensor) -> Tensor:
        """Own parts, with those of prefixes merged in level by level."""
        out, lse = own.run(q, cache, return_lse=True)
        others, other_lse = prefixes.wrapper.run(q[prefixes.rows], cache, return_lse=True)
        for rows, pairs in prefixes.levels:
            merged = self._flashinfer.merge_state(out[rows], lse[rows], others[pairs], other_lse[pairs])
            out[rows], lse[rows] = merged
        result: Tensor = out
        return result

    def _tables(self, segments: Sequence[Segment]) -> tuple[Tables, Shared | None]:
        """Also what they share. A batch that is not for a graph is asked for twice."""
        if self._seen is None or self._seen[0] is not segments:
            tables = tables_of(segments)
            self._seen = segments, tables, shared_of(segments, tables, self._sharing) if self._sharing else None
        return self._seen[1:]

    def _prefixes(self, shared: Shared) -> _Prefixes:
        wrapper = self._wrappers.prefixes(shared.pages)
        levels = tuple((self._index(shared.rows[level]), self._index(level)) for level in shared.levels)
        return _Prefixes(wrapper, self._index(shared.rows), levels)

    def _index(self, rows: NDArray[np.int64]) -> slice | Tensor:
        """A slice where rows follow one another: then nothing is gathered."""
        if (np.diff(rows) == 1).all():
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return to_device(torch.from_numpy(rows), self._pool.data.device)

    def _fence(self, segments: Sequence[Segment]) -> None:
        self._pool.staging.fence(chain.from_iterable(segment.block_ids for segment in segments))


def append_of(segments: Sequence[Segment], pages: Pages, device: torch.device) -> Append:
    """Where the new tokens of `segments`, whose whole tables `pages` are, go: all in one copy."""
    arrays = (*places_of(segments), pages.indices, pages.indptr, pages.last_page_len)
    both = to_device(torch.from_numpy(np.concatenate(arrays)), device)
    return Append(*torch.split(both, [len(array) for array in arrays]))


def _append_from(buffers: Buffers, rows: int) -> Append:
    return Append(
        buffers.requests[:rows],
        buffers.positions[:rows],
        buffers.indices,
        buffers.indptr[: rows + 1],
        buffers.last_page_len[:rows],
    )
