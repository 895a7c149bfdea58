"""Iteration-level scheduling over a block pool: who computes what in the next step.

Each iteration (Orca, OSDI'22) takes every sequence that needs one token first, then chunks of prompts within a token
budget (Sarathi-Serve, arXiv 2403.02310, §4.2). Prefill-only, decode-only and mixed service are what the requests ask,
not modes of this class. Blocks of a whole prompt are reserved on admission, in order of arrival; when a running
sequence finds no block, the youngest running one is preempted and recomputed later (vLLM, arXiv 2309.06180, §4.5).

Pure: no torch, no clock, no threads. It does not compute, and it does not move KV: it says what is to be done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

from kvmesh.engine.api import Admitted, Computing, EngineRequest, Event, Failed, TokenOutput
from kvmesh.engine.batch import Draw, Row, SampledToken
from kvmesh.engine.beam import BeamSearch, beam_outputs
from kvmesh.engine.block_tables import BlockTables
from kvmesh.engine.cache.block_pool import BlockPool
from kvmesh.engine.cache.swap import SwapSpace
from kvmesh.engine.iteration import Export, Iteration, blocks_for
from kvmesh.engine.sequence import Group, SampleState, Sequence
from kvmesh.errors import AlreadyExists, InvalidArgument, Overloaded
from kvmesh.types import BLOCK_TOKENS, FinishReason


class Scheduler(BlockTables):
    """Owns the pool and every request. Every sequence is in exactly one of waiting, loading and running."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_model_len: int,
        max_running: int,
        max_waiting: int,
        token_budget: int,
        swap: SwapSpace | None = None,
    ) -> None:
        super().__init__(pool, swap or SwapSpace())
        self.max_model_len = min(max_model_len, pool.total * BLOCK_TOKENS)
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.token_budget = token_budget

    # What the outside asks ---------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """See `engine.api.Engine.add`."""
        if request.request_id in self.groups:
            raise AlreadyExists(f"request {request.request_id} is already running")
        longest = len(request.prompt) + max((len(sample.tokens) for sample in request.samples), default=0)
        if not request.prompt or not request.samples:
            raise InvalidArgument("the prompt is empty" if not request.prompt else "there are no samples")
        if longest >= self.max_model_len:
            raise InvalidArgument(f"{longest} tokens leave no room in a context of {self.max_model_len}")
        if len(self.waiting) >= self.max_waiting:
            raise Overloaded(f"{self.max_waiting} requests are waiting already")
        group = Group(request, min(request.sampling.max_tokens, self.max_model_len - len(request.prompt)))
        self._check_room(group)
        self.groups[request.request_id] = group
        self.waiting.extend(group.sequences)

    def _check_room(self, group: Group) -> None:
        """What could never run, however idle the engine, is refused; the prompt alone fits by its length."""
        request = group.request
        if group.sequences[0].slots > self.max_running:
            raise Overloaded(f"{group.sequences[0].slots} samples exceed the {self.max_running} that may run at once")
        if not group.beams:
            return
        if request.prefill_only:
            raise InvalidArgument("a beam search computes its prompt where it decodes")
        own = blocks_for(group.longest) + 1
        if blocks_for(len(request.prompt)) + own * request.sampling.beam_width > self.pool.total:
            raise Overloaded(f"{request.sampling.beam_width} beams of {group.longest} tokens do not fit the KV memory")

    def start(self, request_id: str, computed_tokens: int, exports: Collection[tuple[int, int]]) -> None:
        """See `engine.api.Engine.start`."""
        sequence = self.loading.pop(request_id, None)
        if sequence is None:
            return
        sequence.group.exports.extend(exports)
        sequence.computed = max(sequence.computed, min(computed_tokens, sequence.reusable))
        self._publish(sequence)
        self._activate(sequence)

    def abort(self, request_id: str) -> bool:
        """See `engine.api.Engine.abort`."""
        group = self.groups.pop(request_id, None)
        if group is None:
            return False
        self.loading.pop(request_id, None)
        self.waiting = deque(sequence for sequence in self.waiting if sequence.group is not group)
        self.running = [sequence for sequence in self.running if sequence.group is not group]
        for sequence in group.sequences:
            self.pool.release(sequence.blocks)
            self.restored(sequence)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self.running) or (bool(self.waiting) and self._fits(self.waiting[0]))

    def samples(self, sequences: Collection[Sequence]) -> int:
        return sum(sequence.slots for sequence in sequences)

    # One iteration -----------------------------------------------------------------------------------------------

    def schedule(self) -> Iteration:
        """Admits, then picks rows: decodes first, then prompt chunks while the token budget lasts."""
        iteration = Iteration()
        self._admit(iteration)
        decoding = [sequence for sequence in self.running if sequence.pending == 1]
        self._add_rows(decoding, len(decoding), iteration)
        prefilling = [sequence for sequence in self.running if sequence.pending > 1]
        self._add_rows(prefilling, max(1, self.token_budget - len(iteration.rows)), iteration)
        return iteration

    def complete(self, iteration: Iteration, sampled: list[list[SampledToken]]) -> tuple[list[Event], list[Export]]:
        """Takes in what the batch produced; returns the tokens, and the exports to read before the next iteration."""
        events: list[Event] = []
        exports: list[Export] = []
        for sequence, row, tokens in zip(iteration.sequences, iteration.rows, sampled, strict=True):
            request_id = sequence.group.request.request_id
            if failure := next((token.failure for token in tokens if token.failure), ""):
                self.abort(request_id)
                events.append(Failed(request_id, InvalidArgument(failure)))
            if request_id not in self.groups:
                continue
            sequence.computed += len(row.token_ids)
            self._publish(sequence)
            exports += self._due_exports(sequence)
            if not sequence.pending:
                events += self._extend(sequence, tokens)
        return events, exports

    # Admission ---------------------------------------------------------------------------------------------------

    def _admit(self, iteration: Iteration) -> None:
        while self.waiting and self._fits(self.waiting[0]):
            sequence = self.waiting.popleft()
            self._reserve(sequence, iteration)
            group = sequence.group
            first = not group.admitted
            group.admitted = True
            if first:
                iteration.events.append(Admitted(group.request.request_id, sequence.computed))
            if first and group.request.load_kv:
                self.loading[group.request.request_id] = sequence
            else:
                self._activate(sequence)

    def _fits(self, sequence: Sequence) -> bool:
        alive = self.samples(self.running) + self.samples(self.loading.values())
        if alive and alive + sequence.slots > self.max_running:
            return False
        hits = self._hits(sequence)
        needed = blocks_for(len(sequence.tokens)) - len(hits) + self.pool.free_among(hits)
        # Running sequences grow: without a reserve the newcomer would be preempted at once.
        reserve = max(alive, self.pool.total // 100) if alive else 0
        return needed + reserve <= self.pool.free

    def _activate(self, sequence: Sequence) -> None:
        if sequence.pending:
            self.running.append(sequence)
        else:
            self._fork(sequence)

    # Rows and results --------------------------------------------------------------------------------------------

    def _add_rows(self, sequences: list[Sequence], budget: int, iteration: Iteration) -> None:
        for sequence in sequences:
            tokens = min(budget, sequence.pending)
            # One that was preempted to make room for another holds no blocks.
            if tokens and sequence.blocks and self._make_room(sequence, tokens, iteration):
                self._add_row(sequence, tokens, iteration)
                budget -= tokens

    def _add_row(self, sequence: Sequence, tokens: int, iteration: Iteration) -> None:
        group, start = sequence.group, sequence.computed
        if not group.computing:
            group.computing = True
            iteration.events.append(Computing(group.request.request_id))
        draws = tuple(self._draws(sequence)) if tokens == sequence.pending else ()
        iteration.sequences.append(sequence)
        iteration.rows.append(Row(sequence.tokens[start : start + tokens], start, sequence.blocks, draws))

    def _draws(self, sequence: Sequence) -> Iterator[Draw]:
        request, beams = sequence.group.request, sequence.group.beams
        params = beams.draw_params if beams else request.sampling
        for sample in sequence.drawing:
            yield Draw(params, sample.index, len(sample.output), request.prompt, sample.output, request.request_id)

    def _due_exports(self, sequence: Sequence) -> Iterator[Export]:
        group = sequence.group
        while group.exports and group.exports[0][1] <= sequence.computed:
            start, end = group.exports.popleft()
            yield Export(group.request.request_id, tuple(sequence.blocks[: blocks_for(end)]), start, end)

    def _extend(self, sequence: Sequence, tokens: list[SampledToken]) -> list[TokenOutput]:
        if sequence.group.beams:
            return self._extend_beam(sequence, sequence.group.beams, tokens[0])
        outputs = [
            self._output(sequence.group, sample, token) for sample, token in zip(sequence.drawing, tokens, strict=True)
        ]
        ended = {output.index for output in outputs if output.last}
        if len(sequence.samples) > 1:
            sequence.samples = [sample for sample in sequence.samples if sample.index not in ended]
            self._fork(sequence)
        elif ended:
            self._retire(sequence)
        else:
            sequence.tokens.append(tokens[0].token_id)
        return outputs

    def _output(self, group: Group, sample: SampleState, token: SampledToken) -> TokenOutput:
        request, offset = group.request, len(sample.output)
        sample.output.append(token.token_id)
        stopped = offset >= request.sampling.min_tokens and token.token_id in request.sampling.ending_token_ids
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH if len(sample.output) >= group.longest else None
        return TokenOutput(
            request.request_id,
            sample.index,
            offset,
            token.token_id,
            token.logprobs,
            reason,
            token.token_id if stopped else None,
            reason is not None or request.prefill_only,
        )

    def _extend_beam(self, sequence: Sequence, search: BeamSearch, token: SampledToken) -> list[TokenOutput]:
        """Once all beams know what may follow, the next ones fork off; the tokens come when the search is done."""
        beams = sequence.group.sequences
        sequence.likeliest = token.logprobs.top if token.logprobs else ()
        if not all(beam.likeliest for beam in beams):
            return []
        search.advance([beam.likeliest for beam in beams])
        children = [beams[beam.parent].follow(beam, number) for number, beam in enumerate(search.beams)]
        for child in () if search.done else children:
            self.pool.share(child.blocks)
        self._succeed(sequence.group, [] if search.done else children)
        return list(beam_outputs(sequence.group.request, search)) if search.done else []

    def _succeed(self, group: Group, children: list[Sequence]) -> None:
        """The next beams take the turn of those before them."""
        parents, place = group.sequences, self.running.index(group.sequences[0])
        group.sequences = children + parents
        self.running[place:place] = children
        for parent in parents:
            self._retire(parent)

    def _fork(self, trunk: Sequence) -> None:
        children = [trunk.fork(sample) for sample in trunk.samples]
        for child in children:
            self.pool.share(child.blocks)
        trunk.group.sequences += children
        self.running += children
        self._retire(trunk)
