"""How much a model's predictions depend on each element of its KV: one pass forward, one backward.

The predictions are tokens that the model draws for itself at every position, so that the mean square of the gradients
is the Fisher information of the KV. Computes a whole text at once, without a pool; knows no codec.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.engine.api import KvArray
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.loading import load
from kvmesh.engine.models.rope import inverse_frequencies
from kvmesh.hub import ModelFolder

_ROWS = 256


class _Watching:
    """Implements `Attention` for one text from its start, and keeps K and V with their gradients."""

    def __init__(self, windows: Sequence[int | None], planes: int) -> None:
        self._windows = windows
        self._planes = planes
        self.kv: list[tuple[Tensor, ...]] = []

    def plan(self, segments: Sequence[Segment]) -> None:
        """Nothing is shared."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        planes = (k, v)[: self._planes]
        for plane in planes:
            plane.retain_grad()
        self.kv.append(planes)
        group, tokens, window = q.shape[1] // k.shape[1], len(q), self._windows[layer]
        keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (planes[0], planes[-1]))
        ones = torch.ones(tokens, tokens, dtype=torch.bool)
        seen = ones.tril() & ones.triu(1 - window) if window else ones.tril()
        return F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=seen).transpose(0, 1)


class Sensitivity:
    """A model in float32 on the CPU. Gradients take room: all activations of a text, 3 MB a token of a small model."""

    def __init__(self, folder: ModelFolder) -> None:
        self._model = load(folder, "float32", "cpu")

    @property
    def rotary(self) -> tuple[KvArray, int]:
        """Radians a position, float32 `[layers, pairs]`, and the dimension of a head at which what turns begins."""
        config = self._model.config
        layers = range(self._model.first_layer, self._model.end_layer)
        frequencies = [inverse_frequencies(config.rope_of(layer), config.rotary_dim) for layer in layers]
        return torch.stack(frequencies).numpy(), config.head_dim - config.rotary_dim

    def compute(self, tokens: Sequence[int], seed: int = 0) -> tuple[KvArray, KvArray]:
        """KV of a text from its start, and the gradients by it: `[layers, planes, tokens, kv_heads, head_dim]`."""
        model = self._model
        attention = _Watching(model.windows, model.config.kv_planes)
        hidden = model.embed(torch.tensor(tokens)).detach().requires_grad_()
        self._draw(model.forward(hidden, torch.arange(len(tokens)), attention), seed)
        kv = [torch.stack([plane.detach() for plane in planes]) for planes in attention.kv]
        gradients = [torch.stack([_gradient(plane) for plane in planes]) for planes in attention.kv]
        return torch.stack(kv).numpy(), torch.stack(gradients).numpy()

    def _draw(self, hidden: Tensor, seed: int) -> None:
        """Backward from the log-probabilities of drawn tokens, some rows at a time: logits of large vocabularies."""
        generator, end = torch.Generator().manual_seed(seed), hidden.detach().requires_grad_()
        for rows in torch.split(end, _ROWS):
            logprobs = F.log_softmax(self._model.logits(rows), dim=-1)
            drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
            torch.autograd.backward(logprobs.gather(1, drawn).sum())
        torch.autograd.backward(hidden, end.grad)


def _gradient(plane: Tensor) -> Tensor:
    assert plane.grad is not None
    return plane.grad
