"""Token ids for prompts of given lengths and shared parts. Pure and deterministic."""

from __future__ import annotations

import random
from collections.abc import Iterable

from kvmesh.bench.workload import Segment


def vocabulary_range(vocabulary_size: int) -> range:
    """Ids in the middle of a vocabulary: special tokens are at its ends."""
    return range(vocabulary_size // 4, max(vocabulary_size // 2, vocabulary_size // 4 + 1))


def synthesise(prompt: Iterable[Segment], vocabulary: range, seed: float = 0) -> list[int]:
    """Token ids for each segment in turn; equal (id, seed) begin alike whatever their lengths."""
    tokens: list[int] = []
    for segment in prompt:
        chance = random.Random(f"{seed}/{segment.id}")
        tokens += chance.choices(vocabulary, k=segment.tokens)
    return tokens
