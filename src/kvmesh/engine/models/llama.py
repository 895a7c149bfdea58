"""The decoder of Llama and its relatives, over flattened tokens.

Runs layers [first_layer, end_layer): the first stage of a pipeline embeds, the last one yields logits. Knows no
sequence, no block and no mask: all of that is behind `Attention`. Experts are behind `FeedForward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.engine.attention.interface import Attention
from kvmesh.engine.linear import Linear
from kvmesh.engine.models.config import DecoderConfig
from kvmesh.engine.models.feed_forward import FeedForward
from kvmesh.engine.models.fused import Fused, rms_norm
from kvmesh.engine.models.rope import inverse_frequencies, rotation


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`qkv` stacks the rows of the three projections. The other norms are there where the family has them.

    `q_norm` and `k_norm` are as long as what they normalise: one head (Qwen3), or all of them (OLMoE).
    `attention_post_norm` and `mlp_post_norm` are of what the halves of the layer return (Gemma 3).
    """

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    feed_forward: FeedForward
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Weights of a layer range; the ends are present only in the stage that needs them."""

    layers: tuple[LayerWeights, ...]
    embedding: Tensor | None
    norm: Tensor | None
    head: Linear | None


class Decoder:
    """A stage of the model, computing in `dtype`. Attention layers are numbered from 0 within the stage."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, dtype: torch.dtype, first_layer: int, fused: Fused
    ) -> None:
        self.config = config
        self._fused = fused
        self.weights = weights
        self.first_layer = first_layer
        self.end_layer = first_layer + len(weights.layers)
        self.dtype = dtype
        self.device = weights.layers[0].attention_norm.device
        self._ropes = [config.rope_of(layer) for layer in range(self.first_layer, self.end_layer)]
        self._frequencies = {
            rope: inverse_frequencies(rope, config.rotary_dim).to(self.device) for rope in dict.fromkeys(self._ropes)
        }

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding windows of this stage's layers."""
        return self.config.windows[self.first_layer : self.end_layer]

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[tokens]` int64 to `[tokens, hidden]`; first stage only."""
        assert self.weights.embedding is not None
        embedded = F.embedding(token_ids, self.weights.embedding)
        return embedded if self.config.embedding_scale == 1 else embedded * self.config.embedding_scale

    def forward(self, hidden: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Runs this stage's layers over `hidden` `[tokens, hidden]`; `attention` is planned for the same tokens.

        The memory of `hidden` is used up.
        """
        rotations = {
            rope: rotation(positions, frequencies, self.dtype, rope.amplitude)
            for rope, frequencies in self._frequencies.items()
        }
        delta: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            hidden, normed = self._add_norm(hidden, delta, layer.attention_norm)
            attended = self._attend(index, layer, normed, *rotations[self._ropes[index]], attention)
            hidden, normed = self._add_norm(
                hidden, self._maybe_norm(attended, layer.attention_post_norm), layer.mlp_norm
            )
            delta = self._maybe_norm(layer.feed_forward(normed), layer.mlp_post_norm)
        assert delta is not None
        return hidden + delta

    def logits(self, hidden: Tensor) -> Tensor:
        """`[rows, hidden]` to float32 `[rows, vocabulary]`; last stage only."""
        assert self.weights.head is not None
        assert self.weights.norm is not None
        return self.weights.head(self._add_norm(hidden, None, self.weights.norm)[1]).float()

    def _attend(
        self, index: int, layer: LayerWeights, normed: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor:
        config = self.config
        qkv = self._normalised_heads(layer, layer.qkv(normed).view(len(normed), -1, config.head_dim))
        qkv = self._fused.rotate(qkv, config.heads + config.kv_heads, cos, sin)
        q, k, v = torch.split(qkv, [config.heads, config.kv_heads, config.kv_heads], dim=1)
        return layer.output(attention.run(index, q, k, v).flatten(1))

    def _normalised_heads(self, layer: LayerWeights, qkv: Tensor) -> Tensor:
        if layer.q_norm is None or layer.k_norm is None:
            return qkv
        q, k, v = torch.split(qkv, [self.config.heads, self.config.kv_heads, self.config.kv_heads], dim=1)
        return torch.cat((self._norm_heads(q, layer.q_norm), self._norm_heads(k, layer.k_norm), v), dim=1)

    def _norm_heads(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._norm(x.reshape(len(x), -1, len(weight)), weight).view(x.shape)

    def _add_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self._fused.add_norm(hidden, delta, weight, self.config.norm_eps)

    def _maybe_norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._norm(x, weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config.norm_eps)
