"""Attention by torch's fused kernel, one call per sequence and layer, on KV in place or gathered by block.

The kernel's own `enable_gqa` repeats K and V and is 5-7 times slower on a CPU. A decode step therefore folds the query
group into the query length, and a prefill chunk lets the heads of a group share one K and V by a stride of zero.
Knows no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import KvPool
from kvmesh.types import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Reading:
    """How one segment reads its keys: tokens [skip, skip + length) of `blocks`.

    `fresh`: the segment is the whole sequence, so plain causal attention to its own new keys is all.
    """

    rows: slice
    blocks: slice | Tensor
    skip: int
    length: int
    mask: Tensor | None
    fresh: bool

    @property
    def tokens(self) -> int:
        """Of queries."""
        return int(self.rows.stop - self.rows.start)


class CpuAttention:
    """Implements `Attention` for any torch device; `windows` has one entry per layer."""

    def __init__(self, pool: KvPool, windows: Sequence[int | None]) -> None:
        self._pool = pool
        self._windows = windows
        self._slots = torch.empty(0, dtype=torch.int64)
        self._readings: dict[int | None, list[Reading]] = {}

    def plan(self, segments: Sequence[Segment]) -> None:
        self._slots = torch.cat([self._pool.slots(s.block_ids, s.start, s.tokens) for s in segments])
        self._readings = {window: self._read(segments, window) for window in set(self._windows)}

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._pool.store(layer, self._slots, k, v)
        readings = self._readings[self._windows[layer]]
        outputs = [self._attend(layer, reading, q, k, v) for reading in readings]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, layer: int, reading: Reading, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = reading.rows
        if reading.fresh:
            return _attend_many(q[rows], k[rows], v[rows], None, causal=True)
        planes = self._past(layer, reading)
        keys, values = planes[0], planes[-1]
        if reading.tokens == 1:
            return _attend_one(q[rows], keys, values)
        return _attend_many(q[rows], keys, values, reading.mask, causal=False)

    def _past(self, layer: int, reading: Reading) -> Tensor:
        """All that a segment sees: `[planes, tokens, kv_heads, head_dim]`."""
        return self._pool.gather(layer, reading.blocks)[:, reading.skip : reading.skip + reading.length]

    def _read(self, segments: Sequence[Segment], window: int | None) -> list[Reading]:
        readings, first = [], 0
        for segment in segments:
            readings.append(self._reading(segment, window, slice(first, first + segment.tokens)))
            first += segment.tokens
        return readings

    def _reading(self, segment: Segment, window: int | None, rows: slice) -> Reading:
        oldest = max(0, segment.start - window + 1) if window else 0
        first_block = oldest // BLOCK_TOKENS
        fresh = segment.start == 0 and segment.tokens > 1 and (not window or segment.tokens <= window)
        masked = segment.tokens > 1 and not fresh
        return Reading(
            rows=rows,
            blocks=self._blocks(segment.block_ids[first_block : -(-segment.end // BLOCK_TOKENS)]),
            skip=oldest - first_block * BLOCK_TOKENS,
            length=segment.end - oldest,
            mask=self._mask(segment, oldest, window) if masked else None,
            fresh=fresh,
        )

    def _blocks(self, block_ids: Sequence[int]) -> slice | Tensor:
        """A slice where the blocks lie side by side: then nothing is copied."""
        first, count = block_ids[0], len(block_ids)
        if list(block_ids) == list(range(first, first + count)):
            return slice(first, first + count)
        return torch.tensor(block_ids, dtype=torch.int64, device=self._pool.data.device)

    def _mask(self, segment: Segment, oldest: int, window: int | None) -> Tensor:
        """What to add to scores `[tokens, keys]`: 0 where a query sees a key, -inf elsewhere."""
        data = self._pool.data
        queries = torch.arange(segment.start, segment.end, device=data.device).unsqueeze(1)
        keys = torch.arange(oldest, segment.end, device=data.device)
        unseen = (keys > queries) | (keys <= queries - window) if window else keys > queries
        return torch.zeros(unseen.shape, dtype=data.dtype, device=data.device).masked_fill_(unseen, float("-inf"))


def _attend_one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query: its `[1, heads, d]` become `[kv_heads, 1, group, d]`, all of which see every key."""
    folded = q.reshape(keys.shape[1], 1, -1, q.shape[-1])
    k, v = (x.transpose(0, 1).unsqueeze(1) for x in (keys, values))
    return F.scaled_dot_product_attention(folded, k, v).reshape(q.shape)


def _attend_many(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Many queries `[tokens, heads, d]` as a batch of KV heads, each with a group of query heads."""
    tokens, heads, head_dim = q.shape
    group = heads // keys.shape[1]
    grouped = q.reshape(tokens, -1, group, head_dim).permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (keys, values))
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, is_causal=causal)
    return out.permute(2, 0, 1, 3).reshape(q.shape)
