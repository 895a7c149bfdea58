"""The paged KV in device memory: `[layers, planes (K, V), blocks, BLOCK_TOKENS, kv_heads, head_dim]`.

Flattening blocks gives the canonical layout of a token run, so that import and export are one gather. Knows not who
owns a block. Memory is not cleared: nothing reads a position that was not written. Paging: vLLM (arXiv 2309.06180).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvmesh.engine.api import KvArray, KvLayout
from kvmesh.errors import InvalidArgument
from kvmesh.types import BLOCK_TOKENS


class PagedKv(Protocol):
    """What a runner asks of a pool, whatever the layout in which a back end keeps it."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def blocks(self) -> int: ...

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (source, destination), in order."""

    def read(self, block_ids: Sequence[int], start: int, tokens: int) -> KvArray:
        """A private canonical copy of positions [start, start + tokens)."""

    def write(self, block_ids: Sequence[int], start: int, data: KvArray) -> None:
        """Writes canonical KV at positions [start, start + data.shape[2]).

        Raises:
            InvalidArgument: the array is not of this layout.
        """


class KvPool:
    """Implements `PagedKv`; a slot is the index of a token, block · BLOCK_TOKENS + its place in the block."""

    def __init__(self, layout: KvLayout, blocks: int, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        self.blocks = blocks
        shape = (layout.layers, layout.planes, blocks, BLOCK_TOKENS, layout.kv_heads, layout.head_dim)
        self.data = torch.empty(shape, dtype=getattr(torch, layout.dtype), device=device)
        self._slots = self.data.flatten(2, 3)

    def slots(self, block_ids: Sequence[int], start: int, tokens: int) -> Tensor:
        """Slots of positions [start, start + tokens) of a block table, int64 `[tokens]`."""
        positions = np.arange(start, start + tokens)
        table = np.asarray(block_ids, dtype=np.int64)
        slots = table[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        return torch.from_numpy(slots).to(self.data.device)

    def store(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes `k` and `v` `[tokens, kv_heads, head_dim]` of one layer; of a single plane, `k` alone."""
        for plane, data in zip(self._slots[layer], (k, v), strict=False):
            plane.index_copy_(0, slots, data)

    def gather(self, layer: int, blocks: slice | Tensor) -> Tensor:
        """K and V of whole blocks of one layer, `[planes, tokens, kv_heads, head_dim]`; in place for a slice."""
        data = self.data[layer]
        chosen = data[:, blocks] if isinstance(blocks, slice) else data.index_select(1, blocks)
        return chosen.flatten(1, 2)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (source, destination), in order."""
        for source, destination in copies:
            self.data[:, :, destination] = self.data[:, :, source]

    def read(self, block_ids: Sequence[int], start: int, tokens: int) -> KvArray:
        """A private canonical copy of positions [start, start + tokens)."""
        return to_wire(self._slots.index_select(2, self.slots(block_ids, start, tokens)))

    def write(self, block_ids: Sequence[int], start: int, data: KvArray) -> None:
        """Writes canonical KV at positions [start, start + data.shape[2]).

        Raises:
            InvalidArgument: the array is not of this layout.
        """
        check_layout(self.layout, data)
        slots = self.slots(block_ids, start, data.shape[2])
        self._slots.index_copy_(2, slots, from_wire(data, self.data.dtype).to(self.data.device))


def check_layout(layout: KvLayout, data: KvArray) -> None:
    """Refuses an array that is not canonical KV of this layout.

    Raises:
        InvalidArgument: its dtype or shape differs.
    """
    tokens = data.shape[2] if data.ndim == 5 else 0
    if data.shape != layout.chunk_shape(tokens) or data.dtype != layout.wire_dtype:
        raise InvalidArgument(f"KV given as {data.dtype} of shape {data.shape} does not fit the layout {layout}")


def to_wire(tensor: Tensor) -> KvArray:
    """A tensor as numpy, bfloat16 as uint16 bit patterns."""
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def from_wire(data: KvArray, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_wire`."""
    data = np.require(data, requirements=("C", "W"))
    if dtype == torch.bfloat16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)
