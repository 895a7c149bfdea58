"""The decoder of Llama and its relatives, over flattened tokens.

Runs layers [first_layer, end_layer): the first stage of a pipeline embeds, the last one yields logits. Knows no
sequence, no block and no mask: all of that is behind `Attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.engine.attention.interface import Attention
from kvmesh.engine.models.config import DecoderConfig
from kvmesh.engine.models.rope import inverse_frequencies, rotate, rotation


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight.T + bias`, weight `[out, in]`."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`qkv` stacks the rows of the three projections, `gate_up` those of two; q and k norms are Qwen3's."""

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Weights of a layer range; the ends are present only in the stage that needs them."""

    layers: tuple[LayerWeights, ...]
    embedding: Tensor | None
    norm: Tensor | None
    head: Linear | None


class Decoder:
    """A stage of the model. Attention layers are numbered from 0 within the stage."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, first_layer: int = 0) -> None:
        self.config = config
        self.weights = weights
        self.first_layer = first_layer
        self.end_layer = first_layer + len(weights.layers)
        self.dtype = weights.layers[0].qkv.weight.dtype
        self.device = weights.layers[0].qkv.weight.device
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(self.device)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding windows of this stage's layers."""
        return self.config.windows[self.first_layer : self.end_layer]

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[tokens]` int64 to `[tokens, hidden]`; first stage only."""
        assert self.weights.embedding is not None
        return F.embedding(token_ids, self.weights.embedding)

    def forward(self, hidden: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Runs this stage's layers over `hidden` `[tokens, hidden]`; `attention` is planned for the same tokens."""
        cos, sin = rotation(positions, self._frequencies, self.dtype)
        for index, layer in enumerate(self.weights.layers):
            hidden = hidden + self._attend(index, layer, hidden, cos, sin, attention)
            hidden = hidden + self._mlp(layer, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`[rows, hidden]` to float32 `[rows, vocabulary]`; last stage only."""
        assert self.weights.head is not None
        assert self.weights.norm is not None
        return self.weights.head(self._norm(hidden, self.weights.norm)).float()

    def _attend(
        self, index: int, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor:
        config = self.config
        qkv = layer.qkv(self._norm(hidden, layer.attention_norm)).view(len(hidden), -1, config.head_dim)
        rotated = config.heads + config.kv_heads
        qk = rotate(self._normalised_heads(layer, qkv[:, :rotated]), cos, sin)
        q, k, v = qk[:, : config.heads], qk[:, config.heads :], qkv[:, rotated:]
        return layer.output(attention.run(index, q, k, v).flatten(1))

    def _normalised_heads(self, layer: LayerWeights, qk: Tensor) -> Tensor:
        if layer.q_norm is None or layer.k_norm is None:
            return qk
        heads = self.config.heads
        return torch.cat((self._norm(qk[:, :heads], layer.q_norm), self._norm(qk[:, heads:], layer.k_norm)), dim=1)

    def _mlp(self, layer: LayerWeights, hidden: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return layer.down(F.silu(gate).mul_(up))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)
