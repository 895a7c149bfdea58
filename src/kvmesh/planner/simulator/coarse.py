"""The engine's scheduler over prompts that are only lengths: what makes a simulation cheap.

A coarse sequence has no token ids; blocks that others may share have short digests made of the arrival's ids, and what
nobody else can share has none until its sequence is preempted. A pool compares digests, and so decides as it would over
tokens; only what a preempted sequence finds again may differ, where nothing is shared. All decisions are the engine's
own scheduler's: what is replaced here is the data that only a runner would read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import repeat
from typing import cast, overload

from kvmesh.engine.api import Computing
from kvmesh.engine.batch import Draw, Row
from kvmesh.engine.iteration import Iteration, blocks_for
from kvmesh.engine.scheduler import Scheduler
from kvmesh.engine.sequence import Group
from kvmesh.engine.sequence import Sequence as EngineSequence
from kvmesh.planner.simulator.prompts import MAX_PIECES
from kvmesh.types import BLOCK_TOKENS, SamplingParams

NAME_BYTES = 16
SOME_DRAW = (Draw(SamplingParams(1), 0, 0, (), ()),)


class Repeated(Sequence[int]):
    """`length` times the same token: what a list of ids is to a scheduler, in the room of one number."""

    __slots__ = ("length", "token")

    def __init__(self, token: int, length: int) -> None:
        self.token = token
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return repeat(self.token, self.length)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Repeated: ...
    def __getitem__(self, index: int | slice) -> int | Repeated:
        if isinstance(index, slice):
            return Repeated(self.token, len(range(*index.indices(self.length))))
        return self.token

    def append(self, token: int) -> None:
        self.length += 1


class CoarseSequence(EngineSequence):
    """One sample without token ids; `names` are those of the prompt's blocks, none if it shares nothing."""

    __slots__ = ("number",)
    tokens: Repeated  # type: ignore[assignment]

    def __init__(self, group: Group, number: int, length: int, names: Iterable[int]) -> None:
        super().__init__(group, group.sequences[0].samples, Repeated(number, length))  # type: ignore[arg-type]
        self.number = number
        self.hashes = [name.to_bytes(NAME_BYTES, "little") for name in names]

    @property
    def pending(self) -> int:
        return self.tokens.length - self.computed

    def block_hashes(self, tokens: int) -> list[bytes]:
        """Blocks after the shared ones are the request's own, and named so."""
        count = tokens // BLOCK_TOKENS
        if self.hashes:
            self.name_own(count)
        return self.hashes[:count]

    def name_own(self, blocks: int) -> None:
        """Gives names to all of the first `blocks` blocks, so that they can be found again."""
        own = (self.number * MAX_PIECES + block for block in range(len(self.hashes), blocks))
        self.hashes += [b"own" + name.to_bytes(NAME_BYTES, "little") for name in own]

    def leap(self, steps: int, tokens: int, draws: bool) -> None:
        """`steps` iterations of `tokens` tokens each; if it draws, each brings the token that the next computes."""
        if draws:
            self.samples[0].output += repeat(self.number, steps)
            self.tokens.length += steps
        self.computed += steps * tokens


class CoarseScheduler(Scheduler):
    """The engine's scheduler for coarse sequences, which can also do many iterations at once."""

    def make_coarse(self, request_id: str, number: int, names: Iterable[int]) -> None:
        """Puts a coarse sequence in place of the request that was added last."""
        group = self.groups[request_id]
        coarse = CoarseSequence(group, number, len(group.sequences[0].tokens), names)
        group.sequences[0] = self.waiting[-1] = coarse

    def limits(self, iteration: Iteration) -> list[int]:
        """For each row, the iterations until its sequence ends, or its prompt comes to its last chunk."""
        return [self._limit(sequence, row) for sequence, row in zip(iteration.sequences, iteration.rows, strict=True)]

    def _limit(self, sequence: EngineSequence, row: Row) -> int:
        group, tokens = sequence.group, len(row.token_ids)
        if not row.draws:
            return (sequence.pending - 1) // tokens if tokens > 1 else 1
        output = sequence.samples[0].output
        return group.longest - len(output) if tokens == 1 and output and not group.request.prefill_only else 1

    def leap(self, iteration: Iteration, limits: Sequence[int], steps: int) -> Iteration:
        """Does what `steps` rounds of complete() and schedule() would have done, but for the last complete() of the
        sequences that are returned: those that end, or have their first token."""
        rest = Iteration()
        for sequence, row, limit in zip(iteration.sequences, iteration.rows, limits, strict=True):
            tokens, draws = len(row.token_ids), bool(row.draws)
            ends = draws and limit <= steps
            cast(CoarseSequence, sequence).leap(steps - ends, tokens, draws)
            covered = sequence.computed + tokens if ends else sequence.computed
            if covered > len(sequence.blocks) * BLOCK_TOKENS:
                sequence.blocks += self.pool.allocate(blocks_for(covered) - len(sequence.blocks))
            if sequence.hashes:
                self._publish(sequence)
            if ends:
                rest.sequences.append(sequence)
                rest.rows.append(row)
        return rest

    def _publish(self, sequence: EngineSequence) -> None:
        if sequence.hashes:
            super()._publish(sequence)

    def _preempt(self, sequence: EngineSequence, iteration: Iteration) -> None:
        """Who gives way may find its own blocks again."""
        cast(CoarseSequence, sequence).name_own(sequence.computed // BLOCK_TOKENS)
        self._publish(sequence)
        super()._preempt(sequence, iteration)

    def _make_room(self, sequence: EngineSequence, tokens: int, iteration: Iteration) -> bool:
        """Only full blocks are ever shared here, so nothing is copied and most steps need no block."""
        if sequence.computed + tokens <= len(sequence.blocks) * BLOCK_TOKENS:
            return True
        return super()._make_room(sequence, tokens, iteration)

    def _add_row(self, sequence: EngineSequence, tokens: int, iteration: Iteration) -> None:
        group = sequence.group
        if not group.computing:
            group.computing = True
            iteration.events.append(Computing(group.request.request_id))
        iteration.sequences.append(sequence)
        iteration.rows.append(_row(tokens, tokens == sequence.pending))


@cache
def _row(tokens: int, draws: bool) -> Row:
    """A row that nobody runs: how many tokens, and whether it brings one."""
    return Row(range(tokens), 0, (), SOME_DRAW if draws else ())
