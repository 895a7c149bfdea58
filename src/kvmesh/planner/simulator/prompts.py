"""From an arrival to token ids, or to names of blocks: equal where prompts are equal. Knows no engine."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

from kvmesh.planner.simulator.deployment import Arrival
from kvmesh.types import BLOCK_TOKENS

PRIVATE = 1 << 31
"""Token ids from here on belong to one request each."""
MAX_PIECES = 1 << 16
"""Blocks that one id may stand for."""


def literal_prompt(arrival: Arrival, number: int) -> tuple[int, ...]:
    """Token ids: those of a block are its id and its place in it; those without an id are the request's own."""
    pieces = -(-arrival.hash_tokens // BLOCK_TOKENS)
    shared = chain.from_iterable(
        (name % PRIVATE, piece) * (BLOCK_TOKENS // 2) for name in arrival.hashes for piece in range(pieces)
    )
    tokens = tuple(shared)[: arrival.prompt_tokens]
    return tokens + (PRIVATE + number,) * (arrival.prompt_tokens - len(tokens))


@lru_cache(maxsize=1024)
def blank_prompt(tokens: int) -> tuple[int, ...]:
    """For requests of which only the length matters; shared by all of that length."""
    return (0,) * tokens


def block_names(arrival: Arrival) -> list[int]:
    """A number for each full block that others may share."""
    pieces = arrival.hash_tokens // BLOCK_TOKENS
    names = [name * MAX_PIECES + piece for name in arrival.hashes for piece in range(pieces)]
    return names[: arrival.prompt_tokens // BLOCK_TOKENS]
