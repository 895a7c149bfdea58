"""How far the inputs of each matrix product reach, channel by channel, over a short text that ships with kvmesh.

One pass forward in bfloat16, when a precision wants it (SmoothQuant, arXiv 2211.10438, takes 512 sentences; outlier
channels are the same for any text). Knows no packing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.linear import Dense, Linear, Packing
from kvmesh.engine.loading.projections import Projections
from kvmesh.engine.loading.tensors import TensorFolder
from kvmesh.engine.models.llama import Decoder
from kvmesh.hub import ModelFolder
from kvmesh.types import BLOCK_TOKENS

TOKENS = 384


class _Watched:
    """A product that remembers the largest magnitude of each input channel."""

    def __init__(self, inner: Linear, reach: Tensor) -> None:
        self._inner = inner
        self.reach = reach

    def __call__(self, x: Tensor) -> Tensor:
        if len(x):
            torch.maximum(self.reach, x.float().abs().amax(dim=0), out=self.reach)
        return self._inner(x)


class _Watching(Projections):
    """Dense products, watched."""

    def fused(self, outputs: dict[str, int], inputs: int, biased: bool) -> Linear:
        watched = _Watched(super().fused(outputs, inputs, biased), torch.zeros(inputs))
        self.ranges[next(iter(outputs))] = watched.reach  # type: ignore[index]
        return watched


@torch.inference_mode()
def activation_ranges(
    folder: ModelFolder, tensors: TensorFolder, assemble: Callable[[Projections], Decoder]
) -> dict[str, Tensor]:
    """float32 `[in]` of each product by the name of its first projection; `tensors` are bfloat16."""
    ranges: dict[str, Tensor] = {}
    decoder = assemble(_Watching(tensors, Packing(_dense, _dense, _dense, dense=True), ranges))
    ids = sample_tokens(folder, decoder.config.vocabulary_size, min(TOKENS, decoder.config.max_model_len))
    config, blocks = decoder.config, -(-len(ids) // BLOCK_TOKENS)
    layout = KvLayout(config.layers, config.kv_heads, config.head_dim, "bfloat16", config.kv_planes)
    attention = CpuAttention(KvPool(layout, blocks), decoder.windows)
    attention.plan([Segment(0, len(ids), range(blocks))])
    decoder.forward(decoder.embed(torch.tensor(ids)), torch.arange(len(ids)), attention)
    return ranges


def _dense(weight: Tensor, bias: Tensor | None, _: Tensor | None) -> Linear:
    return Dense(weight, bias)


def sample_tokens(folder: ModelFolder, vocabulary_size: int, count: int) -> list[int]:
    """The first tokens of the text; of a folder without a tokenizer, tokens from all over the vocabulary."""
    if not folder.tokenizer_path.is_file():
        return [7919 * i % vocabulary_size for i in range(count)]
    text = (files("kvmesh.engine.loading") / "ranges.txt").read_text()
    ids: list[int] = Tokenizer.from_file(str(folder.tokenizer_path)).encode(text).ids
    return [token % vocabulary_size for token in ids[:count]]
