"""W8A8: int8 weights with a scale per output channel, activations quantised row by row as they come.

By zentorch where it is there, else by torch's own quantised product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.engine.linear import zen
from kvmesh.engine.linear.bf16 import bf16
from kvmesh.engine.linear.interface import Linear

_ZERO_POINT = 128


class TorchInt8:
    """torch's x86 product takes one scale for all of `x`, so each row is first brought to [-1, 1] by its own.

    Without that, a row's result would change with the rows beside it.
    """

    def __init__(self, quantised: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._scales = scales
        self._zeros = torch.zeros(len(scales), dtype=torch.int32)
        self._bias = None if bias is None else bias.float()
        self._multiply = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30).div_(127)
        rows = (x / scale).round_().add_(_ZERO_POINT).to(torch.uint8)
        out: Tensor = self._multiply(
            rows, 1.0, _ZERO_POINT, self._weight, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        out = out.mul_(scale)
        return (out if self._bias is None else out.add_(self._bias)).to(x.dtype)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[out, in]` to int8 values and a float32 scale per row; a row of zeros stays zero."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp_(min=1e-30) / 127
    return (weight / scales.unsqueeze(1)).round_().to(torch.int8), scales


def int8(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest W8A8 product that this machine has; bfloat16 where sums of int8 products would saturate."""
    if not torch.cpu._is_vnni_supported():
        return bf16(weight, bias)
    return (zen.ZenInt8 if zen.available() else TorchInt8)(*quantise(weight), bias)
