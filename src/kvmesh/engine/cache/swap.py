"""KV of preempted sequences: kept in host memory or computed again, whichever costs less.

The two ways of PagedAttention (vLLM, arXiv 2309.06180, §4.5). Costs are measured as they occur. Pure: counts tokens,
holds no KV and copies none.
"""

from __future__ import annotations

from dataclasses import dataclass

SMOOTHING = 0.2
"""Weight of the newest measurement in a running mean."""


@dataclass(slots=True)
class Rate:
    """A running mean of seconds per token; None until measured."""

    seconds: float | None = None

    def observe(self, seconds: float, tokens: int) -> None:
        if tokens > 0:
            new = seconds / tokens
            self.seconds = new if self.seconds is None else self.seconds + SMOOTHING * (new - self.seconds)


class SwapSpace:
    """Room for the KV of `tokens` tokens in host memory; 0: sequences are always recomputed.

    `compute`, `save`, `load`: what the engine measures. Until a copy was measured, copying counts as cheaper.
    """

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = tokens
        self.used = 0
        self.compute, self.save, self.load = Rate(), Rate(), Rate()

    def take(self, tokens: int) -> bool:
        """Takes room for a sequence of so many computed tokens, if it fits and copying it out and in is cheaper."""
        if not 0 < tokens <= self.tokens - self.used or not self._cheaper():
            return False
        self.used += tokens
        return True

    def give_back(self, tokens: int) -> None:
        self.used -= tokens

    def _cheaper(self) -> bool:
        if self.compute.seconds is None:
            return False
        return (self.save.seconds or 0.0) + (self.load.seconds or 0.0) < self.compute.seconds
