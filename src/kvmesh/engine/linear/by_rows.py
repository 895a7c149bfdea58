"""Two packings of one weight: one that is faster for few rows, one for many. Memory buys the better of both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvmesh.engine.linear.interface import Linear


@dataclass(frozen=True, slots=True)
class ByRows:
    """`few` for up to `most` rows, `many` for more."""

    few: Linear
    many: Linear
    most: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.few(x) if len(x) <= self.most else self.many(x)
