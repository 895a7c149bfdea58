"""Weights in the order in which the native products read them: kernel/product.hpp. Knows no library."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.engine.linear.int4 import GROUP, Grid

LANES, DEPTH = 16, 64
"""What numbers of outputs and of inputs are multiples of."""


def fits(weight: Tensor) -> bool:
    """True if the kernel takes a weight of this shape."""
    return len(weight) % LANES == 0 and weight.shape[1] % DEPTH == 0


def pack_int8(quantised: Tensor) -> Tensor:
    """int8 `[out, in]` to uint8 `[out / 16, in / 4, 16, 4]`, each code and 128."""
    codes = (quantised.to(torch.int16) + 128).to(torch.uint8)
    return codes.view(-1, LANES, codes.shape[1] // 4, 4).transpose(1, 2).contiguous()


def pack_int4(grid: Grid) -> Tensor:
    """uint8 `[out / 16, groups, 320]`: codes of inputs j and j + 16 in one byte, then steps and minima as float16."""
    vectors, groups = len(grid.codes) // LANES, grid.codes.shape[1]
    codes = grid.codes.view(vectors, LANES, groups, 2, GROUP // 8, 4).permute(3, 0, 2, 4, 1, 5)
    pairs = (codes[0] | codes[1] << 4).reshape(vectors, groups, -1)
    halves = [x.half().view(vectors, LANES, groups).transpose(1, 2).contiguous() for x in (grid.step, grid.low)]
    return torch.cat((pairs, *(x.view(torch.uint8) for x in halves)), dim=2)


def pack_bf16(weight: Tensor) -> Tensor:
    """`[out, in]` to bfloat16 `[out / 16, in / 2, 16, 2]`."""
    return weight.bfloat16().view(-1, LANES, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()
