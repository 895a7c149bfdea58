"""Iterations of one engine that are alike, one after the other, and when each of them ends."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from kvmesh.engine.iteration import Iteration
from kvmesh.planner.latency.api import Chunk, Latency


@dataclass(slots=True)
class Run:
    """Iterations that are alike, and when each of them ends. `chunks`, `decodes` and `context` are those of the first.

    `limits`: for each row, the iterations until its sequence ends or has its first token; empty if nothing was asked.
    """

    iteration: Iteration
    began: float
    chunks: list[Chunk]
    decodes: int
    context: int
    limits: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    @classmethod
    def begin(cls, iteration: Iteration, now: float) -> Run:
        """Sorts the rows: one token reads the KV of all before it, several are a piece of a prompt."""
        chunks, decodes, context = [], 0, 0
        for sequence, row in zip(iteration.sequences, iteration.rows, strict=True):
            if (tokens := len(row.token_ids)) > 1:
                chunks.append((sequence.computed, tokens))
            else:
                decodes += 1
                context += sequence.computed + 1
        return cls(iteration, now, chunks, decodes, context)

    @property
    def tokens(self) -> int:
        return len(self.ends) * (self.decodes + sum(tokens for _, tokens in self.chunks))

    def extend(self, count: int, latency: Latency) -> None:
        """Makes it `count` iterations long, of which each is alike but for the context that has grown."""
        now = self.began
        for step in range(count):
            chunks = [(start + step * tokens, tokens) for start, tokens in self.chunks]
            now += latency.iteration(chunks, self.decodes, self.context + step * self.decodes)
            self.ends.append(now)

    def cut(self, now: float) -> bool:
        """Leaves no more than the iteration under way at `now`; True if that is fewer."""
        count = bisect_left(self.ends, now) + 1
        cut = count < len(self.ends)
        del self.ends[count:]
        return cut
