"""How far a back end is from the textbook, before it is trusted. Knows no back end."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.interface import Attention, Segment
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.attention.reference import ReferenceAttention

BLOCKS = 8
BATCHES: Sequence[Sequence[Segment]] = (
    (Segment(0, 37, (3, 1, 6)), Segment(0, 9, (5,))),
    (Segment(37, 6, (3, 1, 6)), Segment(9, 1, (5,))),
    (Segment(43, 1, (3, 1, 6)), Segment(32, 1, (3, 1, 2)), Segment(10, 1, (5,))),
)
"""Prompts, then a chunk and a decode, then decodes of which two have two blocks in common."""


@torch.inference_mode()
def largest_error(
    attention: Attention,
    layout: KvLayout,
    heads: int,
    device: torch.device | str = "cpu",
    window: int | None = None,
) -> float:
    """The largest difference over BATCHES in one layer of that window, of a back end whose pool has BLOCKS blocks; NaN
    if there is any.

    A back end that returns fewer dimensions than keys have is compared in those.
    """
    generator = torch.Generator().manual_seed(0)
    textbook = ReferenceAttention(KvPool(layout, BLOCKS, device), [window])
    differences = []
    for segments in BATCHES:
        tokens = sum(segment.tokens for segment in segments)
        q, k, v = (
            torch.randn(tokens, count, layout.head_dim, generator=generator).to(device, getattr(torch, layout.dtype))
            for count in (heads, layout.kv_heads, layout.kv_heads)
        )
        outputs = []
        for way in (attention, textbook):
            way.plan(segments)
            outputs.append(way.run(0, q, k, k if layout.planes == 1 else v).float())
        width = outputs[0].shape[-1]
        differences.append((outputs[0] - outputs[1][..., :width]).abs().max().item())
    return torch.tensor(differences).max().item()  # Python's max would pass over NaN.
