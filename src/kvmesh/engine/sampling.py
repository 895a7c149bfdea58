"""From logits to tokens: penalties, truncation, seeded draws and logprobs, as pure functions.

A draw is a function of the row's logits and of (seed, index, offset) alone: neither the rest of the batch nor the
worker matters. Knows no model and no request. Order as in transformers: repetition, presence and frequency penalty,
bias, minimum length; then temperature, top-k, top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvmesh.engine.batch import Draw, SampledToken
from kvmesh.types import PositionLogprobs, SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy."""
_CANDIDATES = 1024
_MASK = (1 << 64) - 1


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
    """One token per draw from float32 `logits` `[draws, vocabulary]`, which are left alone."""
    if not all(_plain(draw) for draw in draws):
        logits = torch.stack([adjust(row, draw) for row, draw in zip(logits, draws, strict=True)])
    tokens = _greediest(logits)
    for i, draw in enumerate(draws):
        if draw.params.temperature >= GREEDY_BELOW:
            position = uniform(draw.params.seed, draw.index, draw.offset)
            tokens[i] = invert(distribution(logits[i], draw.params), position)
    return [
        SampledToken(token, _logprobs(row, token, draw.params.logprobs))
        for row, token, draw in zip(logits, tokens, draws, strict=True)
    ]


def _greediest(logits: Tensor) -> list[int]:
    """The most probable token of each row, the first one among equals. On a CPU numpy's argmax is ten times torch's."""
    if logits.device.type == "cpu":
        return [int(token) for token in logits.numpy().argmax(axis=-1)]
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def _plain(draw: Draw) -> bool:
    """True if nothing changes the logits of this draw."""
    p = draw.params
    penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    return not (penalised or p.logit_bias or draw.offset < p.min_tokens)


def adjust(logits: Tensor, draw: Draw) -> Tensor:
    """`logits` `[vocabulary]` after penalties, bias and the ban on ending before `min_tokens`; never in place."""
    if _plain(draw):
        return logits
    params, logits = draw.params, logits.clone()
    if params.repetition_penalty != 1.0:
        seen = _indices([*draw.prompt, *draw.output], logits)
        logits[seen] = _penalised(logits[seen], params.repetition_penalty)
    if draw.output and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(_indices(draw.output, logits), minlength=len(logits))
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if params.logit_bias:
        logits[_indices(params.logit_bias, logits)] += logits.new_tensor(list(params.logit_bias.values()))
    if draw.offset < params.min_tokens:
        logits[_indices(params.ending_token_ids, logits)] = float("-inf")
    return logits


def _penalised(logits: Tensor, penalty: float) -> Tensor:
    """The repetition penalty of CTRL (arXiv 1909.05858): divides positive logits, multiplies negative ones."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _indices(tokens: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """Weights to draw from, float64 `[vocabulary]`, zero where truncated, not normalised.

    Each truncation is a least probability, so tokens as probable as the last one kept are kept too: the outcome does
    not depend on how a sort breaks ties.
    """
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    floor = 0.0
    if 0 < params.top_k < len(probabilities):
        floor = probabilities.topk(params.top_k).values[-1].item()
        probabilities = probabilities.where(probabilities >= floor, 0.0)
    if params.top_p < 1.0:
        floor = _top_p_floor(probabilities, params.top_p)
    if params.min_p > 0.0:
        floor = max(floor, params.min_p * probabilities.max().item())
    return probabilities.where(probabilities >= floor, 0.0)


def _top_p_floor(probabilities: Tensor, top_p: float) -> float:
    """Probability of the last token of the smallest set that holds `top_p` of the mass.

    Few tokens hold most of it, so a partial sort is tried first.
    """
    wanted = top_p * probabilities.sum().item()
    ordered = probabilities.topk(min(_CANDIDATES, len(probabilities))).values
    if ordered.sum().item() < wanted:
        ordered = probabilities.sort(descending=True).values
    last = int(torch.searchsorted(ordered.cumsum(dim=-1), wanted))
    return ordered[min(last, len(ordered) - 1)].item()


def invert(weights: Tensor, position: float) -> int:
    """The token at `position` in [0, 1) of the cumulated weights, in order of token id; never one of weight 0."""
    cumulated = weights.cumsum(dim=-1)
    token = int(torch.searchsorted(cumulated, position * cumulated[-1].item(), right=True))
    return min(token, int(weights.nonzero()[-1])) if token >= len(weights) else token


def uniform(seed: int, index: int, offset: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: SplitMix64 (Steele et al., 2014) as a counter hash."""
    state = 0
    for word in (seed, index, offset):
        state = _mix((state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK)
    return (state >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def _logprobs(logits: Tensor, token: int, top: int | None) -> PositionLogprobs | None:
    """Log softmax of the chosen token and of the `top` most probable ones."""
    if top is None:
        return None
    logprobs = logits.double().log_softmax(dim=-1)
    best = logprobs.topk(min(top, len(logprobs)))
    return PositionLogprobs(
        chosen=TokenLogprob(token, logprobs[token].item()),
        top=tuple(map(TokenLogprob, best.indices.tolist(), best.values.tolist())),
    )
