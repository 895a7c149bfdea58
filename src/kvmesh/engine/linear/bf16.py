"""Weights in bfloat16 by libraries, prepacked: by zentorch where it is there, else by torch's oneDNN.

For what the native products (`native`) do not take, and where there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.engine.linear import zen
from kvmesh.engine.linear.dense import Dense
from kvmesh.engine.linear.interface import Linear


class OneDnnBf16:
    """Weights in the blocked order that oneDNN prefers, so that no call reorders them again."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), None)
        self._bias = None if bias is None else bias.bfloat16()
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._multiply(x, self._weight, self._bias, "none", [], "")
        return out


class Widened:
    """Computes in float32, for CPUs without instructions for bfloat16, which torch multiplies four times as slowly."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._dense = Dense(weight.bfloat16().float(), None if bias is None else bias.bfloat16().float())

    def __call__(self, x: Tensor) -> Tensor:
        return self._dense(x.float()).to(x.dtype)


def bf16(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest bfloat16 product that the libraries of this machine have."""
    if zen.available():
        return zen.ZenBf16(weight, bias)
    if torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return OneDnnBf16(weight, bias)
    return Widened(weight, bias)
