"""What the decoder asks of attention: plan once per iteration, run once per layer.

Sequences lie one after the other in flattened tensors; no back end pads one to the length of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.pool import PagedKv


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's queries: positions [start, start + tokens); `block_ids` is its block table from position 0."""

    start: int
    tokens: int
    block_ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.tokens


class Attention(Protocol):
    """Causal attention of new tokens to themselves and to what the pool holds of their sequences."""

    def plan(self, segments: Sequence[Segment]) -> None:
        """Prepares everything that the layers share for segments laid one after the other."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes `k` and `v` `[tokens, kv_heads, head_dim]` to the pool, then attends with `q`.

        `q` and what is returned are `[tokens, heads, head_dim]`. Scores are scaled by 1 / sqrt(head_dim). A pool of one
        plane keeps `k` alone, and `v` is to be the same: values are read out of keys.
        """


BackEnd = Callable[[KvLayout, int, Sequence[int | None]], tuple[PagedKv, Attention]]
"""(layout, blocks, sliding window of each layer) -> a pool, and attention over it."""
