"""Rotary position embedding: frequencies with scaling, and the rotation of halves.

Knows no weights and no cache. Papers: RoFormer (arXiv 2104.09864), Llama 3 scaling (arXiv 2407.21783).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvmesh.engine.models.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position for each pair of dimensions, float32 `[head_dim / 2]`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    return _llama3(rope, frequencies) if rope.kind == "llama3" else frequencies


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Slows waves longer than the trained context by `factor`, leaves short ones, and blends between."""
    turns = rope.original_context * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cosines and signed sines of `positions` `[tokens]`, each `[tokens, 1, head_dim]`."""
    angles = positions.unsqueeze(-1).float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), dim=-1).unsqueeze(1).to(dtype),
        torch.cat((-sin, sin), dim=-1).unsqueeze(1).to(dtype),
    )


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotates `x` `[tokens, heads, head_dim]`."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), signed_sin)
