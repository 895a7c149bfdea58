"""The feed-forward half of a layer: what the decoder asks of it, and the dense one. Knows no attention.

Gated linear unit: arXiv 2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from kvmesh.engine.linear import Linear
from kvmesh.engine.models.fused import Fused


class FeedForward(Protocol):
    """Maps normalised hidden states `[tokens, hidden]` to what is added to the residual stream."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class GatedFeedForward:
    """`down(activation(gate(x)) * up(x))`; `gate_up` stacks the rows of both."""

    gate_up: Linear
    down: Linear
    fused: Fused
    activation: str = "silu"

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if self.activation == "silu":
            return self.down(self.fused.silu_gate(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate="tanh").mul_(up))
