"""The forward pass of one iteration, from token ids to hidden states. Knows no request and draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvmesh.engine.attention.interface import Attention, Segment
from kvmesh.engine.models.llama import Decoder


class Forward(Protocol):
    """Computes segments laid one after the other; valid until the next call."""

    def __call__(self, token_ids: Sequence[int], positions: Sequence[int], segments: Sequence[Segment]) -> Tensor:
        """Hidden states `[tokens, hidden]` after the last layer."""


class EagerForward:
    """Implements `Forward` operation by operation."""

    def __init__(self, model: Decoder, attention: Attention) -> None:
        self._model, self._attention = model, attention

    def __call__(self, token_ids: Sequence[int], positions: Sequence[int], segments: Sequence[Segment]) -> Tensor:
        self._attention.plan(segments)
        device = self._model.device
        tokens, places = (torch.tensor(x, dtype=torch.int64, device=device) for x in (token_ids, positions))
        return self._model.forward(self._model.embed(tokens), places, self._attention)
