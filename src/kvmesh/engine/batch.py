"""What the scheduler asks of a runner: one iteration, as plain data.

Torch-free. A runner holds the weights and the paged KV; it knows no requests, no queues and no prefix cache, and it
never decides what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmesh.engine.api import KvArray, KvLayout
from kvmesh.types import PositionLogprobs, SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to sample from the logits of a row's last token.

    `offset` is the output position of the token to draw; `prompt` and `output` are what penalties count. Randomness
    derives from (params.seed, index, offset) alone, so that any worker draws the same token. `request_id` and `index`
    name the sample, for what a runner remembers of it.
    """

    params: SamplingParams
    index: int
    offset: int
    prompt: Sequence[int]
    output: Sequence[int]
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of an iteration: `token_ids` at positions start, start + 1, …

    `block_ids` is the block table from position 0 and covers start + len(token_ids) tokens; KV before `start` is in
    the pool, KV of these tokens is to be written there. `draws` is empty unless this row ends where a token is due.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    draws: tuple[Draw, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One iteration. Block copies (source, destination) come before anything is computed."""

    rows: tuple[Row, ...]
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`failure`: why no token can be drawn, and the request cannot go on; empty if one was."""

    token_id: int
    logprobs: PositionLogprobs | None = None
    failure: str = ""


class Runner(Protocol):
    """The model and its paged KV of `blocks` blocks of BLOCK_TOKENS tokens."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def blocks(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocabulary_size(self) -> int: ...

    def run(self, batch: Batch) -> list[list[SampledToken]]:
        """Computes the batch; one list of samples per row, in the order of its draws."""

    def read_kv(self, block_ids: Sequence[int], start: int, tokens: int) -> KvArray:
        """A private copy of the KV of positions [start, start + tokens) of a block table, canonical layout."""

    def begin_read_kv(self, block_ids: Sequence[int], start: int, tokens: int) -> Callable[[], KvArray]:
        """As `read_kv`, but what is returned may wait for the copy; the blocks may be written to meanwhile."""

    def write_kv(self, block_ids: Sequence[int], start: int, data: KvArray) -> None:
        """Writes canonical KV at positions [start, start + data.shape[2]) of a block table."""
