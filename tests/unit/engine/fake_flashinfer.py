"""A stand-in for the module `flashinfer` on a CPU: the same names and orders of arguments, slow and exact.

It computes from what it is given alone, in the layouts that FlashInfer 0.6.6 documents, and refuses what that refuses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

PAGE = 16


class FakeFlashInfer:
    """Counts calls by name in `calls`, and the back ends that were asked for in `backends`.

    `wrong`: what is added to results, of "decode", of "prefill", or of those with a "window".
    """

    def __init__(self, wrong: Mapping[str, float] = MappingProxyType({})) -> None:
        self.calls: dict[str, int] = {}
        self.backends: list[str] = []
        self.wrong = wrong

    def count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def BatchDecodeWithPagedKVCacheWrapper(self, *args: Any, **options: Any) -> DecodeWrapper:
        return DecodeWrapper(self, *args, **options)

    def BatchPrefillWithPagedKVCacheWrapper(self, *args: Any, **options: Any) -> PrefillWrapper:
        return PrefillWrapper(self, *args, **options)

    def BatchMLAPagedAttentionWrapper(self, *args: Any, **options: Any) -> LatentWrapper:
        return LatentWrapper(self, *args, **options)

    def append_paged_kv_cache(
        self,
        append_key: Tensor,
        append_value: Tensor,
        batch_indices: Tensor,
        positions: Tensor,
        paged_kv_cache: Tensor,
        kv_indices: Tensor,
        kv_indptr: Tensor,
        kv_last_page_len: Tensor,
        kv_layout: str = "NHD",
    ) -> None:
        assert kv_layout == "NHD"
        assert append_key.dtype == append_value.dtype == paged_kv_cache.dtype
        check_int32(batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
        assert len(batch_indices) == len(positions) == len(append_key)
        for row, (page, place) in enumerate(places(batch_indices, positions, kv_indices, kv_indptr)):
            paged_kv_cache[page, 0, place] = append_key[row]
            paged_kv_cache[page, 1, place] = append_value[row]

    def append_paged_mla_kv_cache(
        self,
        append_ckv: Tensor,
        append_kpe: Tensor,
        batch_indices: Tensor,
        positions: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        kv_indices: Tensor,
        kv_indptr: Tensor,
        kv_last_page_len: Tensor,
    ) -> None:
        check_int32(batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
        assert append_ckv.shape[1:] == (512,)
        assert append_kpe.shape[1:] == (64,)
        for row, (page, place) in enumerate(places(batch_indices, positions, kv_indices, kv_indptr)):
            ckv_cache[page, place], kpe_cache[page, place] = append_ckv[row], append_kpe[row]

    def merge_state(self, v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
        """As FlashInfer: `s` to base 2."""
        self.count("merge")
        assert s_a.dtype == s_b.dtype == torch.float32
        lse = torch.logaddexp2(s_a, s_b)
        parts = [v.float() * torch.exp2(s - lse).unsqueeze(-1) for v, s in ((v_a, s_a), (v_b, s_b))]
        return (parts[0] + parts[1]).to(v_a.dtype), lse


class PrefillWrapper:
    def __init__(
        self, owner: FakeFlashInfer, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto"
    ) -> None:
        assert kv_layout == "NHD"
        assert backend in ("auto", "fa2", "fa3")
        assert not float_workspace_buffer.any()
        self.owner, self.name, self.backend, self.planned = owner, "prefill", backend, False

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        q_data_type: Any = torch.float16,
        kv_data_type: Any = None,
    ) -> None:
        check_int32(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert page_size == PAGE
        self.queries, self.indptr = qo_indptr.tolist(), paged_kv_indptr.clone()
        self.indices, self.last = paged_kv_indices.clone(), paged_kv_last_page_len.clone()
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk)
        self.causal, self.window_left, self.sm_scale = causal, window_left, sm_scale
        self.dtypes = (q_data_type, kv_data_type or q_data_type)
        self.planned = True

    def run(self, q: Tensor, paged_kv_cache: Tensor, *, return_lse: bool = False) -> Any:
        self.owner.count(self.name)
        heads, kv_heads, head_dim = self.shape
        assert self.planned
        assert (q.dtype, paged_kv_cache.dtype) == self.dtypes
        assert q.shape == (self.queries[-1], heads, head_dim)
        assert paged_kv_cache.shape[1:] == (2, PAGE, kv_heads, head_dim)
        parts = [self.request(i, q[a:b], paged_kv_cache) for i, (a, b) in enumerate(pairs(self.queries))]
        out = torch.cat([part[0] for part in parts]).to(q.dtype)
        out += self.owner.wrong.get(self.name, 0) + (self.window_left >= 0) * self.owner.wrong.get("window", 0)
        self.owner.backends.append(self.backend)
        return (out, torch.cat([part[1] for part in parts])) if return_lse else out

    def request(self, i: int, q: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        pages = self.indices[self.indptr[i] : self.indptr[i + 1]].long()
        length = (len(pages) - 1) * PAGE + int(self.last[i])
        keys, values = (cache[pages, plane].flatten(0, 1)[:length].float() for plane in (0, 1))
        scale = self.sm_scale or 1 / math.sqrt(q.shape[-1])
        return attend(q.float(), keys, values, scale, self.causal, self.window_left)


class DecodeWrapper(PrefillWrapper):
    def __init__(
        self,
        owner: FakeFlashInfer,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        super().__init__(owner, float_workspace_buffer, kv_layout)
        self.name, self.tensor_cores = "decode", use_tensor_cores
        self.buffers = None
        if use_cuda_graph:
            self.name = "captured decode"
            given = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
            self.buffers = [buffer for buffer in given if buffer is not None]
            assert len(self.buffers) == 3
            assert len(self.buffers[0]) == len(self.buffers[2]) + 1

    def plan(  # type: ignore[override]
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        heads: int,
        kv_heads: int,
        *args: Any,
        **options: Any,
    ) -> None:
        if not self.tensor_cores:
            assert heads // kv_heads in (1, 2, 3, 4, 8), "the CUDA-core kernel has no such group"
        queries = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        super().plan(queries, indptr, indices, last_page_len, heads, kv_heads, *args, **options)
        if self.buffers:
            assert len(last_page_len) == len(self.buffers[2]), "a captured batch has a fixed size"
            assert len(indices) <= len(self.buffers[1])
            for buffer, given in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
                buffer[: len(given)].copy_(given)
            self.indptr, self.indices, self.last = self.buffers


class LatentWrapper:
    def __init__(self, owner: FakeFlashInfer, float_workspace_buffer: Tensor) -> None:
        self.owner = owner

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        check_int32(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        assert (head_dim_ckv, head_dim_kpe, page_size, causal) == (512, 64, PAGE, True)
        self.queries, self.indptr, self.indices = qo_indptr.tolist(), kv_indptr.tolist(), kv_indices
        self.lengths, self.heads, self.scale = kv_len_arr.tolist(), num_heads, sm_scale
        self.dtypes = (q_data_type, kv_data_type)

    def run(self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor) -> Tensor:
        self.owner.count("latent")
        assert (q_nope.dtype, ckv_cache.dtype) == self.dtypes
        assert q_nope.shape[1:] == (self.heads, 512)
        outputs = []
        for i, (a, b) in enumerate(pairs(self.queries)):
            pages = self.indices[self.indptr[i] : self.indptr[i + 1]].long()
            latents, rotary = (c[pages].flatten(0, 1)[: self.lengths[i]].float() for c in (ckv_cache, kpe_cache))
            keys = torch.cat((latents, rotary), dim=-1).unsqueeze(1)
            q = torch.cat((q_nope[a:b], q_pe[a:b]), dim=-1).float()
            outputs.append(attend(q, keys, latents.unsqueeze(1), self.scale, True, -1)[0])
        return torch.cat(outputs).to(q_nope.dtype)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, window_left: int
) -> tuple[Tensor, Tensor]:
    """Queries are the last tokens of their KV; log-sum-exp to base 2."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->qhk", q, keys) * scale
    distance = torch.arange(len(keys) - len(q), len(keys)).unsqueeze(1) - torch.arange(len(keys))
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window_left >= 0:
        hidden = hidden | (distance > window_left)
    scores = scores.masked_fill(hidden.unsqueeze(1), float("-inf"))
    return torch.einsum("qhk,khd->qhd", scores.softmax(dim=-1), values), scores.logsumexp(dim=-1) / math.log(2)


def pairs(indptr: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(indptr))


def places(requests: Tensor, positions: Tensor, indices: Tensor, indptr: Tensor) -> list[tuple[int, int]]:
    return [
        (int(indices[indptr[request] + position // PAGE]), position % PAGE)
        for request, position in zip(requests.tolist(), positions.tolist(), strict=True)
    ]


def check_int32(*tensors: Tensor) -> None:
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in tensors)
