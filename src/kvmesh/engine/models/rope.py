"""Rotary position embedding: frequencies with scaling, and the rotation of halves.

Knows no weights and no cache. Papers: RoFormer (arXiv 2104.09864), Llama 3 scaling (arXiv 2407.21783), YaRN (arXiv
2309.00071).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvmesh.engine.models.rope_config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position for each pair of dimensions, float32 `[head_dim / 2]`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "yarn":
        return _yarn(rope, frequencies)
    return _llama3(rope, frequencies) if rope.kind == "llama3" else frequencies


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Slows waves longer than the trained context by `factor`, leaves short ones, and blends between."""
    turns = rope.original_context * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(rope: Rope, frequencies: Tensor) -> Tensor:
    """Slows dimensions that turn less than `beta_slow` times in the trained context, blends up to `beta_fast`."""
    pairs = len(frequencies)

    def pair_turning(times: float) -> float:
        return pairs * math.log(rope.original_context / (times * 2 * math.pi)) / math.log(rope.theta)

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    slowed = (torch.arange(pairs) - low) / max(high - low, 0.001)
    slowed = slowed.clamp(0.0, 1.0)
    return slowed * frequencies / rope.factor + (1 - slowed) * frequencies


def rotation(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, amplitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The cosines and signed sines of `positions` `[tokens]` times `amplitude`, each `[tokens, 1, head_dim]`."""
    angles = positions.unsqueeze(-1).float() * frequencies
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    return (
        torch.cat((cos, cos), dim=-1).unsqueeze(1).to(dtype),
        torch.cat((-sin, sin), dim=-1).unsqueeze(1).to(dtype),
    )


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotates `x` `[tokens, heads, head_dim]`."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), signed_sin)
