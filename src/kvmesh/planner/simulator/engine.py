"""An engine whose runner is a latency model: the real scheduler and block pool decide, modelled time passes.

Coarse, the usual way, it leaps over runs of iterations that are alike: the same sequences decode, and one prompt
advances by the same number of tokens, until a sequence ends, a prompt is complete, or blocks may run short. The real
scheduler decides the first of a run and completes the last. Literal, it takes every step over real token ids; both
give equal results, which tests assert. Knows no links, no policy and no event queue.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.engine.api import EngineRequest, Event, Sample
from kvmesh.engine.batch import SampledToken
from kvmesh.engine.cache.block_pool import BlockPool
from kvmesh.engine.sequence import Sequence as EngineSequence
from kvmesh.planner.simulator.baseline import scheduler_class
from kvmesh.planner.simulator.coarse import CoarseScheduler
from kvmesh.planner.simulator.deployment import Arrival, Instance
from kvmesh.planner.simulator.prompts import blank_prompt, block_names, literal_prompt
from kvmesh.planner.simulator.run import Run
from kvmesh.types import BLOCK_TOKENS, SamplingParams

LONGEST_RUN = 256


class Engine:
    """One instance's engine. Requests are known by their numbers."""

    def __init__(self, instance: Instance, max_waiting: int, literal: bool = False) -> None:
        self._latency = instance.latency
        self._literal = literal
        self._held: dict[str, list[int]] = {}
        self.scheduler = scheduler_class(literal, instance.prefill_first)(
            BlockPool(instance.blocks),
            max_model_len=instance.blocks * BLOCK_TOKENS,
            max_running=instance.max_running,
            max_waiting=max_waiting,
            token_budget=instance.token_budget,
        )

    # Requests ----------------------------------------------------------------------------------------------------

    def add(
        self,
        number: int,
        arrival: Arrival,
        *,
        prefill_only: bool = False,
        prefilled: bool = False,
        stored: bool = False,
    ) -> None:
        """Queues a request; `prefilled`: its prompt comes from elsewhere, with one token of output.

        `stored`: the beginning of its prompt comes from elsewhere: `start` says when, and how much.

        Raises:
            KvmeshError: as `engine.api.Engine.add`.
        """
        sample = Sample(0, (number,) if prefilled else ())
        prompt = literal_prompt(arrival, number) if self._literal else blank_prompt(arrival.prompt_tokens)
        sampling = SamplingParams(max_tokens=arrival.output_tokens)
        request = EngineRequest(
            str(number), prompt, sampling, (sample,), load_kv=prefilled or stored, prefill_only=prefill_only
        )
        self.scheduler.add(request)
        if isinstance(self.scheduler, CoarseScheduler):
            self.scheduler.make_coarse(request.request_id, number, block_names(arrival))

    def start(self, number: int, tokens: int) -> None:
        """KV of the first `tokens` tokens of an admitted request is here."""
        self.scheduler.start(str(number), tokens, ())

    def release(self, number: int) -> bool:
        """Gives back the blocks of a prompt that was computed for another instance; False if there are none."""
        blocks = self._held.pop(str(number), None)
        self.scheduler.pool.release(blocks or [])
        return blocks is not None

    # Iterations --------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> tuple[Run | None, Sequence[Event]]:
        """Admits and schedules: the run that begins now, None if there is nothing to compute, and what happened."""
        preemptions = self.scheduler.preemptions
        iteration = self.scheduler.schedule()
        if not iteration.rows:
            return None, iteration.events
        run = Run.begin(iteration, now)
        if isinstance(self.scheduler, CoarseScheduler):
            run.limits = self.scheduler.limits(iteration)
        calm = run.limits and preemptions == self.scheduler.preemptions
        run.extend(self._alike(run) if calm else 1, self._latency)
        return run, iteration.events

    def _alike(self, run: Run) -> int:
        """How many iterations, this one included, are sure to be like it."""
        sequences, scheduler = run.iteration.sequences, self.scheduler
        if scheduler.waiting and any(sequence.hashes for sequence in sequences):
            return 1  # What they publish could let the next in line fit.
        room = scheduler.pool.free // len(sequences) * BLOCK_TOKENS
        return max(1, min(LONGEST_RUN, 1 + room, *run.limits))

    def finish(self, run: Run) -> Sequence[Event]:
        """The run is over: its events, less the tokens of sequences that go on (but for each one's first)."""
        iteration = run.iteration
        if isinstance(self.scheduler, CoarseScheduler):
            iteration = self.scheduler.leap(iteration, run.limits, len(run.ends))
        sampled = [
            [SampledToken(int(sequence.group.request.request_id))] if row.draws else []
            for sequence, row in zip(iteration.sequences, iteration.rows, strict=True)
        ]
        for sequence, tokens in zip(iteration.sequences, sampled, strict=True):
            if tokens and sequence.group.request.prefill_only:
                self._hold(sequence)
        events, _ = self.scheduler.complete(iteration, sampled)
        return events

    def _hold(self, sequence: EngineSequence) -> None:
        """Keeps the blocks of a prompt, which the scheduler is about to let go, until somebody has fetched them."""
        self.scheduler.pool.share(sequence.blocks)
        self._held[sequence.group.request.request_id] = sequence.blocks

    def check_integrity(self) -> list[str]:
        """What is wrong with the pool; empty is good."""
        groups = self.scheduler.groups.values()
        tables = [sequence.blocks for group in groups for sequence in group.sequences]
        return self.scheduler.pool.check_integrity([*tables, *self._held.values()])
