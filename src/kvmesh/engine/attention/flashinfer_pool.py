"""Paged KV as FlashInfer reads it: pages of one layer side by side, K and V of a page together (its layout NHD).

The layout on the wire stays the canonical one: it is converted here, on the device. Knows not who owns a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvmesh.engine.api import KvArray, KvLayout
from kvmesh.engine.attention.pool import check_layout, from_wire, to_wire
from kvmesh.engine.cuda.staging import Staging, to_device
from kvmesh.types import BLOCK_TOKENS


class PagePool:
    """Implements `PagedKv`; `data` `[layers, blocks + 1, planes, BLOCK_TOKENS, kv_heads, head_dim]`.

    The last page belongs to nobody: rows that only fill up a batch write there. `stored`: the dtype in memory, the
    layout's by default; float8_e4m3fn halves the memory and is not exact, so its KV must not be taken for exact KV.
    """

    def __init__(
        self,
        layout: KvLayout,
        blocks: int,
        device: torch.device | str,
        staging: Staging,
        stored: torch.dtype | None = None,
    ) -> None:
        self.layout, self.blocks, self.staging = layout, blocks, staging
        self.dtype: torch.dtype = getattr(torch, layout.dtype)
        shape = (layout.layers, blocks + 1, layout.planes, BLOCK_TOKENS, layout.kv_heads, layout.head_dim)
        # Nothing else would write to all of the last page, and what is there takes part in sums with weight zero.
        self.data = torch.zeros(shape, dtype=stored or self.dtype, device=device)
        # torch indexes bytes where it does not index float8.
        self._raw = self.data if self.data.itemsize > 1 else self.data.view(torch.uint8)

    @property
    def scratch(self) -> int:
        """The page that belongs to nobody."""
        return self.blocks

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        self.staging.fence([block for copied in copies for block in copied])
        for source, destination in copies:
            self._raw[:, destination] = self._raw[:, source]

    def read(self, block_ids: Sequence[int], start: int, tokens: int) -> KvArray:
        return self.begin_read(block_ids, start, tokens)()

    def begin_read(self, block_ids: Sequence[int], start: int, tokens: int) -> Callable[[], KvArray]:
        """Begins what `read` does; what is returned waits for the end of it. The blocks may be written to meanwhile."""
        self.staging.fence(block_ids)
        pages, places = self._slots(block_ids, start, tokens)
        taken = self._raw[:, pages, :, places].permute(1, 2, 0, 3, 4).contiguous()
        download = self.staging.download(taken.view(self.data.dtype).to(self.dtype))
        return lambda: to_wire(download.result())

    def write(self, block_ids: Sequence[int], start: int, data: KvArray) -> None:
        check_layout(self.layout, data)

        def put(given: Tensor) -> None:
            # Here, since memory belongs to the stream that it was taken in.
            pages, places = self._slots(block_ids, start, data.shape[2])
            stored = given.to(self.data.dtype).view(self._raw.dtype)
            self._raw[:, pages, :, places] = stored.permute(2, 0, 1, 3, 4)

        touched = block_ids[start // BLOCK_TOKENS : -(-(start + data.shape[2]) // BLOCK_TOKENS)]
        self.staging.upload(touched, from_wire(data, self.dtype), put)

    def _slots(self, block_ids: Sequence[int], start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The page of each token and its place there, int64 `[tokens]`."""
        positions = np.arange(start, start + tokens)
        pages = np.asarray(block_ids, dtype=np.int64)[positions // BLOCK_TOKENS]
        both = to_device(torch.from_numpy(np.stack((pages, positions % BLOCK_TOKENS))), self.data.device)
        return both[0], both[1]
