"""Beam search: from the candidates of the running beams to the next beams, and to the best hypotheses in the end.

The rules are those of `transformers`' generate(num_beams=...), so that its answers are ours: of (1 + ending tokens) x
width candidates the best `width` that go on run, and those among the first `width` that end are hypotheses, scored by
their sum of log-probabilities over length ** length_penalty. Pure: knows no KV; the scheduler forks block tables as
told here (PagedAttention, arXiv 2309.06180, section 4.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest

from kvmesh.engine.api import EngineRequest, TokenOutput
from kvmesh.types import FinishReason, PositionLogprobs, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Beam:
    """Tokens with their log-probabilities. `parent`: which of the beams before it goes on."""

    tokens: tuple[TokenLogprob, ...] = ()
    total: float = 0.0
    parent: int = 0

    def extended(self, token: TokenLogprob, parent: int) -> Beam:
        return Beam((*self.tokens, token), self.total + token.logprob, parent)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A beam that has ended."""

    beam: Beam
    score: float
    reason: FinishReason


class BeamSearch:
    """One search over outputs of at most `longest` tokens; begins with one empty beam."""

    def __init__(self, params: SamplingParams, longest: int) -> None:
        self._params = params
        self._longest = longest
        self.draw_params = replace(params, temperature=0.0, logprobs=self.candidates)
        """What to draw with, to see the candidates of a beam."""
        self.beams = [Beam()]
        self.hypotheses: list[Hypothesis] = []
        self.done = False

    @property
    def candidates(self) -> int:
        """How many of the likeliest tokens of each beam `advance` needs to see."""
        return max(2, 1 + len(self._params.ending_token_ids)) * self._params.beam_width

    def advance(self, likeliest: Sequence[Sequence[TokenLogprob]]) -> None:
        """Takes the likeliest next tokens of each beam, best first; `beams` are then the next ones, best first."""
        width = self._params.beam_width
        grown = [
            beam.extended(token, parent)
            for parent, (beam, tokens) in enumerate(zip(self.beams, likeliest, strict=True))
            for token in tokens
            if token.logprob > -math.inf
        ]
        ranked = nlargest(self.candidates, grown, key=lambda beam: beam.total)
        ended = [(beam, reason) for beam in ranked[:width] if (reason := self._reason(beam))]
        self.beams = [beam for beam in ranked if self._reason(beam) is None][:width]
        self._keep(ended)
        self.done = self._is_done(len(ranked[0].tokens) if ranked else 0)

    def best(self) -> list[Hypothesis]:
        """The `n` best hypotheses, best first; beams that nothing could follow count as they are."""
        stuck = [self._hypothesis(beam, FinishReason.LENGTH) for beam in self.beams if beam.tokens]
        found = self.hypotheses or stuck
        return nlargest(self._params.n, found, key=lambda hypothesis: hypothesis.score)

    def _reason(self, beam: Beam) -> FinishReason | None:
        long_enough = len(beam.tokens) > self._params.min_tokens
        if long_enough and beam.tokens[-1].token_id in self._params.ending_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(beam.tokens) >= self._longest else None

    def _keep(self, ended: Sequence[tuple[Beam, FinishReason]]) -> None:
        if self._full and self._params.early_stopping:
            return
        found = self.hypotheses + [self._hypothesis(beam, reason) for beam, reason in ended]
        self.hypotheses = nlargest(self._params.beam_width, found, key=lambda hypothesis: hypothesis.score)

    def _hypothesis(self, beam: Beam, reason: FinishReason) -> Hypothesis:
        return Hypothesis(beam, beam.total / len(beam.tokens) ** self._params.length_penalty, reason)

    @property
    def _full(self) -> bool:
        return len(self.hypotheses) >= self._params.beam_width

    def _is_done(self, length: int) -> bool:
        """No beam is left, or none can still beat the worst hypothesis, estimated at the length that it has."""
        if not self.beams:
            return True
        if not self._full:
            return False
        if self._params.early_stopping:
            return True
        return bool(self.beams[0].total / length**self._params.length_penalty <= self.hypotheses[-1].score)


def beam_outputs(request: EngineRequest, search: BeamSearch) -> Iterator[TokenOutput]:
    """The best hypotheses as samples, best first, without the tokens that a sample already has.

    Where a grammar leaves fewer hypotheses than samples, the last one stands for the rest.
    """
    best = search.best()
    for sample in request.samples:
        hypothesis = best[min(sample.index, len(best) - 1)]
        tokens = hypothesis.beam.tokens
        for offset, token in list(enumerate(tokens))[len(sample.tokens) :]:
            last = offset == len(tokens) - 1
            yield TokenOutput(
                request.request_id,
                sample.index,
                offset,
                token.token_id,
                None if request.sampling.logprobs is None else PositionLogprobs(token),
                hypothesis.reason if last else None,
                token.token_id if last and hypothesis.reason is FinishReason.STOP else None,
                last,
            )
