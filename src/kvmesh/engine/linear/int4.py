"""Weight-only int4 in groups of 32, the geometry of GGUF's Q4_0 and Q4_1: for few rows, where reading weights is all.

A dequantised Q4 matrix lies on a grid of at most 16 levels per group. `on_grid` finds it again, so weights that came
from such a file are held without a further loss; others are rounded to the nearest of 16 levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
_LEVELS = 15
_OFF_GRID = 1e-3
"""Farther than this from a level, in steps, is between two levels: dequantisation in float32 errs by far less."""
_LEAST_STEPS = 7
"""A Q4_0 group whose values have one sign reaches this far; fewer steps would fit almost anything."""


@dataclass(frozen=True, slots=True)
class Grid:
    """`weight = low + step * codes`: codes uint8 `[out, groups, 32]`, low and step float32 `[out, groups, 1]`."""

    codes: Tensor
    low: Tensor
    step: Tensor
    exact: bool

    def dequantised(self) -> Tensor:
        """float32 `[out, in]`."""
        return (self.low + self.step * self.codes).flatten(1)


def fits(weight: Tensor) -> bool:
    """True if the kernel takes a weight of this shape."""
    rows, columns = weight.shape
    return rows % 16 == 0 and columns % GROUP == 0


def on_grid(weight: Tensor) -> Grid:
    """The grid of each group of `[out, in]`: the most steps from least to greatest that meet all values."""
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    above, span = groups - low, high - low
    step, (codes, met) = span / _LEVELS, _codes(above, span / _LEVELS)
    for steps in range(_LEVELS - 1, _LEAST_STEPS - 1, -1):
        if bool(met.all()):
            break
        other, fits_other = _codes(above, span / steps)
        better = fits_other & ~met
        step, codes, met = step.where(~better, span / steps), codes.where(~better, other), met | better
    return Grid(codes.to(torch.uint8), low, step, exact=bool(met.all()))


def _codes(above: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest levels, and per group whether every value is on one."""
    levels = above / step.clamp(min=1e-30)
    codes = levels.round()
    return codes, levels.sub_(codes).abs_().amax(dim=2, keepdim=True) <= _OFF_GRID


class Int4:
    """torch's packed kernel: code c of a group stands for `(c - 8) * scale + zero`, so zero is low + 8 steps."""

    def __init__(self, grid: Grid, bias: Tensor | None = None) -> None:
        codes = grid.codes.flatten(1).to(torch.int32)
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.cat((grid.step, grid.low + 8 * grid.step), dim=2)
        self._scales = scales.transpose(0, 1).contiguous().bfloat16()
        self._bias = None if bias is None else bias.bfloat16()
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._multiply(x, self._weight, GROUP, self._scales)
        return out if self._bias is None else out.add_(self._bias)
