"""One iteration as the scheduler plans it: plain data for whoever computes. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmesh.engine.api import Event
from kvmesh.engine.batch import Batch, Row
from kvmesh.engine.sequence import Sequence
from kvmesh.types import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Export:
    """KV of tokens [start, end) of a block table is final and was asked for; read it before the next iteration."""

    request_id: str
    block_ids: tuple[int, ...]
    start: int
    end: int


@dataclass(slots=True)
class Iteration:
    """One step: the batch to run, whose rows belong to `sequences` in order, and what happened on the way.

    First of all KV goes to host memory (`saves`: a sequence and the blocks that it had) and then comes back
    (`restores`: a sequence and the first token whose KV is not in its blocks).
    """

    sequences: list[Sequence] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    saves: list[tuple[Sequence, tuple[int, ...]]] = field(default_factory=list)
    restores: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def batch(self) -> Batch:
        return Batch(tuple(self.rows), tuple(self.copies))


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)
