"""Multi-head latent attention: DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437).

The cache holds, per token, one normalised latent that all heads expand into keys and values, and one rotated part of
the key that all heads share. Where a back end does not expand them itself, expansion is absorbed: queries move into the
latent space instead of keys out of it, so that attention is that of many query heads to one KV head, whose values are
the first `rank` dimensions of its keys. Knows no sequence and no block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmesh.engine.attention.interface import Attention
from kvmesh.engine.attention.latent import LatentAttention, LatentHeads
from kvmesh.engine.linear import Linear
from kvmesh.engine.models.fused import rms_norm
from kvmesh.engine.models.latent_config import Latent
from kvmesh.engine.models.llama import Decoder, LayerWeights
from kvmesh.engine.models.rope import rotate

_LATENT_NORM_EPS = 1e-6
"""Of the norms inside attention, whatever the model's own is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayerWeights(LayerWeights):
    """`qkv` stacks queries, or what `query_up` expands into them, and the cache entry: latent, then rotary part.

    `key_up` `[heads, nope_dim, rank]` moves a query into the latent space, `value_up` `[heads, rank, value_dim]` a
    mean of latents out of it. Rotary rows are in the order that `rotate` expects: halves, not neighbours.
    """

    latent_norm: Tensor
    key_up: Tensor
    value_up: Tensor
    query_norm: Tensor | None = None
    query_up: Linear | None = None


class LatentDecoder(Decoder):
    """A stage of a model with latent attention."""

    @property
    def latent(self) -> Latent:
        assert self.config.latent is not None
        return self.config.latent

    def _attend(
        self, index: int, layer: LayerWeights, normed: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor:
        assert isinstance(layer, LatentLayerWeights)
        latent, rank = self.latent, self.latent.rank
        projected = layer.qkv(normed)
        query, entry = projected.tensor_split((projected.shape[-1] - latent.entry_dim,), dim=-1)
        q = self._queries(layer, query)
        rotated = rotate(torch.cat((q[..., latent.nope_dim :], entry[:, None, rank:]), dim=1), cos, sin)
        q = torch.cat((q[..., : latent.nope_dim], rotated[:, :-1]), dim=-1)
        k = torch.cat((rms_norm(entry[:, :rank], layer.latent_norm, _LATENT_NORM_EPS), rotated[:, -1]), dim=-1)
        k = k.unsqueeze(1)
        heads = LatentHeads(layer.key_up, layer.value_up, latent.scale, self.config.query_scale)
        if isinstance(attention, LatentAttention):
            out = attention.run_heads(index, q, k, heads)
        else:
            out = heads.emerge(attention.run(index, heads.absorb(q), k, k))
        return layer.output(out.flatten(1))

    def _queries(self, layer: LatentLayerWeights, query: Tensor) -> Tensor:
        """`[tokens, heads, nope_dim + rope_dim]`."""
        if layer.query_up is not None and layer.query_norm is not None:
            query = layer.query_up(rms_norm(query, layer.query_norm, _LATENT_NORM_EPS))
        return query.reshape(len(query), self.config.heads, self.latent.head_dim)
