"""Attention to a cache of latents on torch devices: on the latents, or on the keys and values that they expand to.

Expanding costs rank · (nope + value) multiplications per cached token and head, in every chunk again; a query then
meets a token in nope + rope + value of them, instead of 2 · rank + rope (DeepSeek-V2, arXiv 2405.04434). So
long chunks of prompts expand, and steps of one token never do; each sequence of a batch is judged alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.engine.attention.cpu import CpuAttention, Reading


@dataclass(frozen=True)
class LatentHeads:
    """What the heads of a layer make of latents: `key_up` `[heads, nope, rank]`, `value_up` `[heads, rank, value]`.

    `scale` is that of a score; `query_scale` what it takes beyond 1 / sqrt(rank + rope).
    """

    key_up: Tensor
    value_up: Tensor
    scale: float
    query_scale: float

    @property
    def rank(self) -> int:
        return self.key_up.shape[2]

    @property
    def nope(self) -> int:
        return self.key_up.shape[1]

    def absorb(self, q: Tensor) -> Tensor:
        """Queries `[tokens, heads, nope + rope]` as latents see them: `[tokens, heads, rank + rope]`."""
        latent = torch.einsum("thn,hnr->thr", q[..., : self.nope], self.key_up)
        return torch.cat((latent, q[..., self.nope :]), dim=-1).mul_(self.query_scale)

    def emerge(self, means: Tensor) -> Tensor:
        """Means of entries `[tokens, heads, rank + rope]` as values `[tokens, heads, value]`."""
        return torch.einsum("thr,hrv->thv", means[..., : self.rank], self.value_up)

    def expand(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Cache entries `[tokens, rank + rope]` as keys and values of every head: `[heads, tokens, dim]`."""
        latents, rotary = entries[:, : self.rank], entries[:, self.rank :]
        keys = torch.cat((latents @ self.key_up.mT, rotary.expand(len(self.key_up), -1, -1)), dim=-1)
        return keys, latents @ self.value_up

    def pays(self, tokens: int, length: int, rope: int) -> bool:
        """Whether `tokens` queries that see `length` entries cost less when these are expanded."""
        value = self.value_up.shape[2]
        pairs = tokens * (length - (tokens - 1) / 2)
        expansion = self.rank * (self.nope + value)
        absorbed = tokens * expansion + pairs * (2 * self.rank + rope)
        return length * expansion + pairs * (self.nope + rope + value) < absorbed


class LatentAttention(CpuAttention):
    """As `CpuAttention`, and with the heads' weights it chooses the cheaper way for each sequence."""

    def run_heads(self, layer: int, q: Tensor, entries: Tensor, heads: LatentHeads) -> Tensor:
        """Writes `entries` `[tokens, 1, rank + rope]` to the pool; `q` is not absorbed. `[tokens, heads, value]`."""
        readings = self._readings[self._windows[layer]]
        rope = q.shape[-1] - heads.nope
        expanding = [heads.pays(reading.tokens, reading.length, rope) for reading in readings]
        absorbed = q if all(expanding) else heads.absorb(q)
        if not any(expanding):
            return heads.emerge(self.run(layer, absorbed, entries, entries))
        self._pool.store(layer, self._slots, entries, entries)
        outputs = [
            self._expanded(layer, reading, q, entries, heads)
            if expands
            else heads.emerge(self._attend(layer, reading, absorbed, entries, entries))
            for reading, expands in zip(readings, expanding, strict=True)
        ]
        return torch.cat(outputs)

    def _expanded(self, layer: int, reading: Reading, q: Tensor, entries: Tensor, heads: LatentHeads) -> Tensor:
        seen = entries[reading.rows] if reading.fresh else self._past(layer, reading)[0]
        keys, values = heads.expand(seen[:, 0])
        width, queries = values.shape[2], q[reading.rows].transpose(0, 1)
        # The fused kernel wants a batch, and values as wide as keys.
        q, k, v = (x[None] for x in (queries, keys, F.pad(values, (0, keys.shape[2] - width))))
        mask, causal = reading.mask, reading.fresh
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=heads.scale)
        return out[0, ..., :width].transpose(0, 1)
