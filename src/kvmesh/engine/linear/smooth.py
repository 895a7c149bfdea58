"""Int8 products of activations with outliers: SmoothQuant (arXiv 2211.10438).

A few input channels are tens of times larger than the others, and would take nearly all of a row's 8 bits. Dividing the
channels of the activations by a factor that the weights are multiplied by moves a part of that difficulty to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.engine.linear.int8 import int8
from kvmesh.engine.linear.interface import Linear

STRENGTH = 0.6
"""How much of a channel's range moves to the weights. Of 0.5, 0.6, 0.65 and 0.8 the best on SmolLM2."""
_LEAST = 1e-5


class Smoothed:
    """`inner` of activations times `factors` `[in]`."""

    def __init__(self, inner: Linear, factors: Tensor) -> None:
        self._inner = inner
        self._factors = factors

    def __call__(self, x: Tensor) -> Tensor:
        return self._inner(x * self._factors)


def smooth_int8(weight: Tensor, bias: Tensor | None, ranges: Tensor | None) -> Linear:
    """W8A8 of a weight `[out, in]` whose inputs reach `ranges` `[in]` in magnitude; plain W8A8 where none is known."""
    if ranges is None:
        return int8(weight, bias)
    factors = (1 / scales(weight, ranges)).bfloat16()
    return Smoothed(int8(weight.float() / factors.float(), bias), factors)


def scales(weight: Tensor, ranges: Tensor) -> Tensor:
    """What activations are divided by, float32 `[in]`; 1 for channels that were never seen to be anything but 0."""
    reach = weight.float().abs().amax(dim=0).clamp_(min=_LEAST)
    found = ranges.float().clamp(min=_LEAST) ** STRENGTH / reach ** (1 - STRENGTH)
    return torch.where(ranges > 0, found, torch.ones_like(found))
