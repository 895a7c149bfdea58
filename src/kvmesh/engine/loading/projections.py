"""Matrix products from named tensors: which rows are stacked, and how the packing wants to see them.

A packing that quantises gets the weights as they are stored, in float32: only there do they lie on their grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvmesh.engine.linear import Linear, Packing
from kvmesh.engine.loading.tensors import TensorFolder

DOWN = ("down_proj", "w2")
"""How the projection out of a feed-forward is called."""


@dataclass(frozen=True, slots=True)
class Projections:
    """The products of a model folder; `tensors` yields the dtype that `packing` wants.

    `ranges`: how far the inputs of a product reach, by the name of its first projection.
    """

    tensors: TensorFolder
    packing: Packing
    ranges: Mapping[str, Tensor] = field(default_factory=dict)

    def fused(self, outputs: dict[str, int], inputs: int, biased: bool) -> Linear:
        """Stacks projections {name: rows} of one input into one matrix product."""
        weight = [self.tensors.get(f"{name}.weight", rows, inputs) for name, rows in outputs.items()]
        bias = [self.tensors.get(f"{name}.bias", rows) for name, rows in outputs.items()] if biased else []
        first = next(iter(outputs))
        pack = self.packing.down if first.endswith(DOWN) else self.packing.layer
        return pack(_stack(weight), _stack(bias) if bias else None, self.ranges.get(first))

    def head(self, name: str, rows: int, inputs: int) -> Linear:
        """The projection to logits."""
        return self.packing.head(self.tensors.get(name, rows, inputs), None, None)

    def tied_head(self, embedding: Tensor, name: str) -> Linear:
        """As `head`, of the embedding; a dense packing shares the tensor."""
        return self.packing.head(
            embedding if self.packing.dense else self.tensors.get(name, *embedding.shape), None, None
        )


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
