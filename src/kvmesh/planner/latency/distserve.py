"""DistServe's latency model (OSDI 2024, appendix A, as fitted in its repository): straight lines in tokens.

    prefill = a + b·tokens + c·Σ length²        decode = a + b·context + c·batch, with other constants for large batches

A chunk that ends at `e` and starts at `s` costs the squares e² - s², so that a prompt costs the same however it is cut,
but for the constants. An iteration of both kinds pays the larger constant and the sum of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.planner.latency.api import Chunk, Latency

Line = tuple[float, float, float]
"""Seconds: a constant and the factors of the two terms."""


@dataclass(frozen=True, slots=True)
class DistServeLatency(Latency):
    """Constants in seconds; `large` holds from `large_batch` sequences on."""

    prompt: Line
    small: Line
    large: Line
    large_batch: int = 95

    def iteration(self, chunks: Sequence[Chunk], decodes: int, context: int) -> float:
        constant = variable = 0.0
        if chunks:
            constant, per_token, per_square = self.prompt
            tokens = squares = 0
            for start, count in chunks:
                tokens += count
                squares += count * (2 * start + count)
            variable = per_token * tokens + per_square * squares
        if decodes:
            fixed, per_context, per_sequence = self.small if decodes < self.large_batch else self.large
            constant = max(constant, fixed)
            variable += per_context * context + per_sequence * decodes
        return constant + variable
