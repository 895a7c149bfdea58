"""Attention as the textbook writes it: the oracle for every other back end.

Slow on purpose: scores of one sequence and all its heads at once, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import KvPool


class ReferenceAttention:
    """Implements `Attention`; `windows` has one entry per layer."""

    def __init__(self, pool: KvPool, windows: Sequence[int | None]) -> None:
        self._pool = pool
        self._windows = windows
        self._segments: Sequence[Segment] = ()

    def plan(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs, first = [], 0
        for segment in self._segments:
            rows = slice(first, first := first + segment.tokens)
            slots = self._pool.slots(segment.block_ids, 0, segment.end)
            self._pool.store(layer, slots[segment.start :], k[rows], v[rows])
            planes = self._pool.data[layer].flatten(1, 2).index_select(1, slots).float()
            outputs.append(_attend(q[rows].float(), planes[0], planes[-1], segment, self._windows[layer]))
        return torch.cat(outputs).to(q.dtype)


def _attend(q: Tensor, keys: Tensor, values: Tensor, segment: Segment, window: int | None) -> Tensor:
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, keys) / q.shape[-1] ** 0.5
    distance = torch.arange(segment.start, segment.end).unsqueeze(1) - torch.arange(segment.end)
    hidden = (distance < 0) | (distance >= (window or segment.end))
    weights = scores.masked_fill(hidden.to(q.device), float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
