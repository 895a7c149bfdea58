"""Latent attention on CUDA by FlashInfer: absorbed, over pages of one latent and one rotary part a token.

Its kernels take latents of 512 and rotary parts of 64, as DeepSeek has them. Prefixes are not shared and steps are not
captured here. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kvmesh.engine.attention.flashinfer import Append, append_of
from kvmesh.engine.attention.flashinfer_api import FlashInfer
from kvmesh.engine.attention.flashinfer_pool import PagePool
from kvmesh.engine.attention.flashinfer_tables import pages_of, tables_of
from kvmesh.engine.attention.flashinfer_wrappers import WORKSPACE_BYTES
from kvmesh.engine.attention.interface import Segment
from kvmesh.types import BLOCK_TOKENS

LATENT, ROTARY = 512, 64


class FlashInferLatentAttention:
    """Implements `Attention` of many heads to one KV head; what `run` returns is `[tokens, heads, LATENT]`.

    The rotary part of a mean of keys means nothing, and nobody reads it.
    """

    def __init__(self, pool: PagePool, heads: int, flashinfer: FlashInfer) -> None:
        self._pool, self._heads, self._flashinfer = pool, heads, flashinfer
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.data.device)
        self._wrapper: Any = flashinfer.BatchMLAPagedAttentionWrapper(workspace)
        self._append: Append | None = None

    def plan(self, segments: Sequence[Segment]) -> None:
        self._pool.staging.fence(chain.from_iterable(segment.block_ids for segment in segments))
        pages = pages_of(segments, tables_of(segments), self._pool.blocks)
        self._append = append_of(segments, pages, self._pool.data.device)
        queries, indptr, lengths = (torch.from_numpy(x) for x in (pages.queries, pages.indptr, pages.lengths))
        self._wrapper.plan(
            queries,
            indptr,
            self._append.indices,
            lengths,
            self._heads,
            LATENT,
            ROTARY,
            BLOCK_TOKENS,
            True,
            (LATENT + ROTARY) ** -0.5,
            self._pool.dtype,
            self._pool.data.dtype,
        )

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, cache = self._append, self._pool.data[layer, :, 0, :, 0]
        assert a is not None
        latents, rotary = cache.tensor_split((LATENT,), dim=-1)
        self._flashinfer.append_paged_mla_kv_cache(
            *k.squeeze(1).tensor_split((LATENT,), dim=-1),
            a.requests,
            a.positions,
            latents,
            rotary,
            a.indices,
            a.indptr,
            a.last_page_len,
        )
        out: Tensor = self._wrapper.run(*q.tensor_split((LATENT,), dim=-1), latents, rotary)
        return out
