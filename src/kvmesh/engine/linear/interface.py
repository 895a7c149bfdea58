"""What the decoder asks of a linear layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Linear(Protocol):
    """`x @ weight.T + bias` for a weight of `[out, in]`, however that is stored."""

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]` of the same dtype; a row's result depends on no other row's values."""
