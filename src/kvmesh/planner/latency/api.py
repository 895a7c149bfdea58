"""How long one iteration of an engine takes: the interface behind which every latency model stands.

A model knows numbers of tokens and nothing else: no requests, no queues, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Chunk = tuple[int, int]
"""(start, tokens): a piece of a prompt that begins at position `start`."""


class Latency(Protocol):
    """The time model of one engine on one machine, or on a group of them."""

    def iteration(self, chunks: Sequence[Chunk], decodes: int, context: int) -> float:
        """Seconds of an iteration that computes `chunks` of prompts, and one token each for `decodes` sequences that
        have `context` tokens of KV altogether; 0 if there is nothing to compute."""
        ...

    def prefill(self, lengths: Sequence[int]) -> float:
        """Seconds for whole prompts in one iteration."""
        return self.iteration([(0, tokens) for tokens in lengths], 0, 0)

    def decode(self, batch: int, context: int) -> float:
        """Seconds for one token each of `batch` sequences with `context` tokens of KV altogether."""
        return self.iteration((), batch, context)
