"""Structured output: which tokens a sample's grammar allows next, for a whole batch at once.

A matcher follows each sample; it is a cache, not a state that could be lost: one that is gone, or of a sample that came
from another worker, is made anew from the tokens generated so far. So a request survives its worker in mid-sentence.
Knows no logits and no request; torch-free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

from kvmesh.engine.batch import Draw
from kvmesh.grammar import source
from kvmesh.types import Grammar

MAX_MATCHERS = 512


@dataclass(slots=True)
class _Follower:
    """A matcher, and the tokens that it has taken in."""

    matcher: LLMatcher
    grammar: Grammar
    tokens: list[int]

    def follows(self, draw: Draw) -> bool:
        return self.grammar == draw.params.grammar and self.tokens == draw.output[: len(self.tokens)]

    def catch_up(self, output: Sequence[int]) -> None:
        new = list(output[len(self.tokens) :])
        if new:
            self.matcher.consume_tokens(new)
            self.tokens += new


class Grammars:
    """`tokenizer`: a tokenizer.json. A sample may end, with one of `eos_token_ids`, where its grammar is satisfied."""

    def __init__(self, tokenizer: Path, vocabulary_size: int, eos_token_ids: Collection[int], threads: int = 1) -> None:
        self._tokenizer = LLTokenizer(tokenizer.read_text(), n_vocab=vocabulary_size, eos_token=sorted(eos_token_ids))
        self._executor = LLExecutor(threads)
        self._vocabulary_size = vocabulary_size
        self._followers: OrderedDict[tuple[str, int], _Follower] = OrderedDict()

    def allowed(self, draws: Sequence[Draw]) -> tuple[npt.NDArray[np.bool_], list[str]]:
        """For each draw, all of which have a grammar, the tokens allowed, `[draws, vocabulary]`, and what went wrong.

        A problem is empty for most; where it is not (a limit of the parser, or an output so far that does not match the
        grammar), nothing is allowed.
        """
        followers = [self._follower(draw) for draw in draws]
        bits = allocate_token_bitmask(len(draws), self._vocabulary_size)
        fill_next_token_bitmask_par(self._executor, [(f.matcher, row) for row, f in enumerate(followers)], bits)
        problems = [_first_line(follower.matcher.get_error()) for follower in followers]
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=self._vocabulary_size, bitorder="little").view(bool)
        allowed[[bool(problem) for problem in problems]] = False
        return allowed, problems

    def _follower(self, draw: Draw) -> _Follower:
        key = (draw.request_id, draw.index)
        follower = self._followers.pop(key, None)
        if follower is None or not follower.follows(draw):
            assert draw.params.grammar is not None
            follower = _Follower(LLMatcher(self._tokenizer, source(draw.params.grammar)), draw.params.grammar, [])
        follower.catch_up(draw.output)
        self._followers[key] = follower
        if len(self._followers) > MAX_MATCHERS:
            self._followers.popitem(last=False)
        return follower


def _first_line(error: str) -> str:
    return error.splitlines()[0] if error else ""
