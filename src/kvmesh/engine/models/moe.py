"""Mixture of experts: each token runs through the few experts that its router chooses.

Tokens are sorted by expert, so that each expert is one matrix product over its own rows, and scattered back weighted.
The order in which a token's experts are added depends on nothing but the token: batching does not change it.
Knows not which model it serves. Papers: Mixtral (arXiv 2401.04088), DeepSeek-V3 (arXiv 2412.19437), MegaBlocks for
the grouping (arXiv 2211.15841).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.engine.linear import Linear
from kvmesh.engine.models.expert_config import Routing
from kvmesh.engine.models.feed_forward import FeedForward


@dataclass(frozen=True, slots=True)
class Router:
    """`weight` `[experts, hidden]` and `bias` `[experts]` in float32: which experts a token needs is a close call."""

    weight: Tensor
    routing: Routing
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their float32 weights, both `[tokens, active]`."""
        scores = self._scores(F.linear(x.float(), self.weight))
        choice = self._allowed(scores if self.bias is None else scores + self.bias)
        experts = choice.topk(self.routing.active, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.routing.renormalised:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        return experts, weights * self.routing.scale

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.routing.score == "sigmoid" else logits.softmax(dim=-1)

    def _allowed(self, choice: Tensor) -> Tensor:
        """Scores with -inf for experts outside the best groups."""
        if self.routing.groups == 1:
            return choice
        grouped = choice.view(len(choice), self.routing.groups, -1)
        rivals = min(2, grouped.shape[-1]) if self.routing.biased else 1
        group_scores = grouped.topk(rivals, dim=-1).values.sum(dim=-1)
        chosen = group_scores.topk(self.routing.active_groups, dim=-1).indices
        losing = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, chosen, False)
        return grouped.masked_fill(losing.unsqueeze(-1), float("-inf")).flatten(-2)


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Implements `FeedForward`. Every token also runs through `shared`; `shared_gate` `[hidden, 1]` weighs that."""

    router: Router
    experts: Sequence[FeedForward]
    shared: FeedForward | None = None
    shared_gate: Linear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        out = self._routed(x)
        if self.shared is None:
            return out
        shared = self.shared(x)
        return out.add_(shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)

    def _routed(self, x: Tensor) -> Tensor:
        experts, weights = self.router(x)
        chosen, order = experts.flatten().sort(stable=True)
        tokens = order // experts.shape[1]
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        outputs = torch.cat(list(self._grouped(x.index_select(0, tokens), counts)))
        weighted = outputs * weights.flatten().index_select(0, order).unsqueeze(1)
        return x.new_zeros(x.shape, dtype=weighted.dtype).index_add_(0, tokens, weighted).to(x.dtype)

    def _grouped(self, rows: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
        """Runs each expert over its `counts[expert]` consecutive rows."""
        first = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                yield expert(rows[first : first + count])
            first += count
