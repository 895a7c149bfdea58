"""FlashInfer's wrappers: made once for each use, planned for each batch. Knows no batch and no KV.

Each has work space of its own on the device and in pinned memory, 8 MiB both, beside what all of them share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvmesh.engine.attention.flashinfer_api import FlashInfer
from kvmesh.engine.attention.flashinfer_tables import Pages
from kvmesh.engine.cuda.staging import to_device
from kvmesh.types import BLOCK_TOKENS

CAPTURED_ROWS = 256
"""The most rows of a captured step."""
WORKSPACE_BYTES = 128 << 20
CUDA_CORE_GROUPS = (1, 2, 3)
"""Query heads to a KV head up to which decode does without tensor cores; the kernels have no more but 4 and 8."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What a kernel is compiled for; `stored` is the dtype of KV in memory."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def tensor_cores(self) -> bool:
        """Whether decode is to use them."""
        return self.stored != self.dtype or self.heads // self.kv_heads not in CUDA_CORE_GROUPS

    @property
    def workspace(self) -> int:
        """Bytes. A captured step splits every row's KV; partial outputs are float32, in tiles of 16 rows."""
        return max(WORKSPACE_BYTES, 2 * CAPTURED_ROWS * 16 * self.heads * self.head_dim * 4)

    @property
    def options(self) -> dict[str, Any]:
        return {"q_data_type": self.dtype, "kv_data_type": self.stored, "sm_scale": self.head_dim**-0.5}


@dataclass(frozen=True, slots=True)
class Buffers:
    """Memory that a captured decode step reads its batch from, for up to `rows` rows, int32 on the device."""

    requests: Tensor
    positions: Tensor
    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor

    @classmethod
    def empty(cls, rows: int, pages: int, device: torch.device | str) -> Buffers:
        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        requests = torch.arange(rows, dtype=torch.int32, device=device)
        return cls(requests, zeros(rows), zeros(rows + 1), zeros(pages), zeros(rows))


class Wrappers:
    """Planned wrappers, whose `run(q, cache)` attends."""

    def __init__(self, heads: Heads, device: torch.device | str, flashinfer: FlashInfer) -> None:
        self.heads, self.device, self.flashinfer = heads, torch.device(device), flashinfer
        # Zero, as FlashInfer wants it for the first use.
        self._workspace = torch.zeros(heads.workspace, dtype=torch.uint8, device=device)
        self._made: dict[tuple[object, ...], Any] = {}

    def decode(self, pages: Pages, window: int | None, captured: tuple[int, Buffers] | None = None) -> Any:
        """For requests of one query each; `captured`: the rows of a graph, and where it reads its batch."""
        bucket, buffers = captured or (0, None)
        wrapper = self._wrapper(("decode", window, bucket), lambda: self._decode_wrapper(bucket, buffers))
        self._plan(wrapper, (pages.indptr, pages.last_page_len), pages, window)
        return wrapper

    def chunks(self, pages: Pages, window: int | None) -> Any:
        """For requests of any number of queries, the last of which is the last token of its KV.

        FlashInfer's newest kernels give every query head of a request a tile of 128 rows and do not split its KV, which
        suits prompts alone: FA2 is for batches in which somebody decodes.
        """
        alone = bool((np.diff(pages.queries) > 1).all())
        return self._prefill("chunks", pages, window, "auto" if alone else "fa2", causal=True)

    def prefixes(self, pages: Pages) -> Any:
        """For requests all of whose queries see all of their KV, of which each row is a decode's."""
        return self._prefill("prefixes", pages, None, "fa2", causal=False)

    def _prefill(self, use: str, pages: Pages, window: int | None, backend: str, causal: bool) -> Any:
        wrapper = self._wrapper((use, window, backend), lambda: self._prefill_wrapper(backend))
        self._plan(wrapper, (pages.queries, pages.indptr, pages.last_page_len), pages, window, causal=causal)
        return wrapper

    def _plan(self, wrapper: Any, host: tuple[Any, ...], pages: Pages, window: int | None, **options: bool) -> None:
        """`host` stays there, where planning reads it, but for the pages, which lie before the last of `host`."""
        *first, last = (torch.from_numpy(array) for array in host)
        h = self.heads
        # A window of FlashInfer does not count the query itself.
        left = -1 if window is None else window - 1
        wrapper.plan(
            *first,
            to_device(torch.from_numpy(pages.indices), self.device),
            last,
            h.heads,
            h.kv_heads,
            h.head_dim,
            BLOCK_TOKENS,
            window_left=left,
            **options,
            **h.options,
        )

    def _wrapper(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _prefill_wrapper(self, backend: str) -> Any:
        return self.flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=backend)

    def _decode_wrapper(self, bucket: int, buffers: Buffers | None) -> Any:
        make, cores = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper, self.heads.tensor_cores
        if buffers is None:
            return make(self._workspace, "NHD", use_tensor_cores=cores)
        return make(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=cores,
            paged_kv_indptr_buffer=buffers.indptr[: bucket + 1],
            paged_kv_indices_buffer=buffers.indices,
            paged_kv_last_page_len_buffer=buffers.last_page_len[:bucket],
        )
