"""Whether FlashInfer serves here: imported, made for these heads, and in agreement with the textbook."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.agreement import BLOCKS, largest_error
from kvmesh.engine.attention.flashinfer import FlashInferAttention, SavedBytes
from kvmesh.engine.attention.flashinfer_api import FlashInfer, import_flashinfer
from kvmesh.engine.attention.flashinfer_mla import LATENT, ROTARY, FlashInferLatentAttention
from kvmesh.engine.attention.flashinfer_pool import PagePool
from kvmesh.engine.attention.interface import Attention, BackEnd
from kvmesh.engine.attention.native_build import CannotBuild
from kvmesh.engine.attention.pool import PagedKv
from kvmesh.engine.attention.prefixes import Cost
from kvmesh.engine.cuda.staging import staging_for
from kvmesh.types import BLOCK_TOKENS

HEAD_DIMS = (64, 128, 256)
TOLERANCE = 5e-2
CHECKED_WINDOW = 20
"""Kernels with a window are others than those without, whatever the window is: this one is short enough to matter."""


def supports(layout: KvLayout) -> bool:
    """Whether its kernels have this dtype and these heads."""
    if layout.dtype not in ("bfloat16", "float16"):
        return False
    if layout.planes == 1:
        return (layout.kv_heads, layout.head_dim) == (1, LATENT + ROTARY)
    return layout.head_dim in HEAD_DIMS


def flashinfer_back_end(
    heads: int,
    device: torch.device | str,
    flashinfer: FlashInfer,
    stored: torch.dtype | None = None,
    sharing: Callable[[KvLayout], Cost | None] | None = None,
) -> BackEnd:
    """The back end of a model with so many query heads.

    `stored`: the dtype of KV in memory, if not the layout's. `sharing`: when a prefix is read once, by the layout.
    """

    def build(layout: KvLayout, blocks: int, windows: Sequence[int | None]) -> tuple[PagedKv, Attention]:
        pool = PagePool(layout, blocks, device, staging_for(device), stored)
        if layout.planes == 1:
            return pool, FlashInferLatentAttention(pool, heads, flashinfer)
        cost = (sharing or saved_bytes)(layout)
        return pool, FlashInferAttention(pool, windows, heads, flashinfer, cost)

    return build


def saved_bytes(layout: KvLayout) -> Cost:
    """Sharing by the bytes that it saves a layer."""
    return SavedBytes(block_bytes=BLOCK_TOKENS * layout.bytes_per_token // layout.layers)


def checked_flashinfer(
    layout: KvLayout,
    heads: int,
    device: torch.device | str,
    load: Callable[[], FlashInfer] = import_flashinfer,
    windows: Collection[int | None] = (None,),
) -> BackEnd:
    """The back end for KV of this layout and layers of these windows. Without libraries built ahead this compiles for
    minutes, once.

    Raises:
        CannotBuild: it does not support the layout, cannot be imported or built, or gives wrong results.
    """
    if not supports(layout):
        raise CannotBuild(f"FlashInfer does not take {layout.planes} x {layout.dtype} with heads of {layout.head_dim}")
    flashinfer, one = load(), replace(layout, layers=1)
    # Every prefix is shared, however short, so that merging is checked too.
    eager = flashinfer_back_end(heads, device, flashinfer, sharing=lambda layout: SavedBytes(least=1))
    for window in {window and CHECKED_WINDOW for window in windows}:
        try:
            error = largest_error(eager(one, BLOCKS, [window])[1], one, heads, device, window)
        except Exception as problem:
            raise CannotBuild(f"FlashInfer fails: {problem}") from problem
        if not error < TOLERANCE:
            raise CannotBuild(f"FlashInfer is off by {error:.2g}")
    return flashinfer_back_end(heads, device, flashinfer)
