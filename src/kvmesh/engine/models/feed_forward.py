"""The feed-forward half of a layer: what the decoder asks of it, and the dense one. Knows no attention.

Gated linear unit: arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from kvmesh.engine.linear import Linear


class FeedForward(Protocol):
    """Maps normalised hidden states `[tokens, hidden]` to what is added to the residual stream."""

    def __call__(self, x: Tensor) -> Tensor: ...


def _silu(gate: Tensor) -> Tensor:
    return F.silu(gate)


def _gelu_tanh(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"silu": _silu, "gelu_tanh": _gelu_tanh})


@dataclass(frozen=True, slots=True)
class GatedFeedForward:
    """`down(activation(gate(x)) * up(x))`; `gate_up` stacks the rows of both."""

    gate_up: Linear
    down: Linear
    activation: str = "silu"

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(ACTIVATIONS[self.activation](gate).mul_(up))
