"""The engine: a scheduler, a block pool and a runner, stepped by whoever owns the thread.

Knows no event loop and no network; torch only if its runner does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence

from kvmesh.engine.api import EngineRequest, Event, Failed, KvArray, KvLayout, KvReady
from kvmesh.engine.batch import Batch, Runner, SampledToken
from kvmesh.engine.cache.block_pool import BlockPool
from kvmesh.engine.cache.swap import SwapSpace
from kvmesh.engine.iteration import Export, Iteration
from kvmesh.engine.scheduler import Scheduler
from kvmesh.errors import InvalidArgument
from kvmesh.types import BLOCK_TOKENS, WorkerCapacity, WorkerStatistics

log = logging.getLogger(__name__)


class EngineCore:
    """Implements `engine.api.Engine` on any `engine.batch.Runner`.

    `token_budget`: tokens computed in one iteration at most (decodes first, prompt chunks with the rest).
    `max_running`: samples that hold blocks at once. `max_waiting`: requests that may queue. `swap_bytes`: host memory
    for the KV of preempted sequences.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_running: int = 64,
        max_waiting: int = 256,
        token_budget: int = 512,
        swap_bytes: int = 0,
    ) -> None:
        self.runner = runner
        self.scheduler = Scheduler(
            BlockPool(runner.blocks),
            max_model_len=runner.max_model_len,
            max_running=max_running,
            max_waiting=max_waiting,
            token_budget=token_budget,
            swap=SwapSpace(swap_bytes // runner.layout.bytes_per_token),
        )
        self._totals = {"requests": 0, "tokens": 0}

    @property
    def layout(self) -> KvLayout:
        return self.runner.layout

    @property
    def capacity(self) -> WorkerCapacity:
        """What the engine can hold, as a worker advertises it."""
        return WorkerCapacity(
            blocks=self.runner.blocks,
            block_tokens=BLOCK_TOKENS,
            max_running=self.scheduler.max_running,
            max_model_len=self.scheduler.max_model_len,
            end_layer=self.layout.layers,
            memory_bytes=self.runner.blocks * BLOCK_TOKENS * self.layout.bytes_per_token,
        )

    def add(self, request: EngineRequest) -> None:
        self.scheduler.add(request)
        self._totals["requests"] += 1

    def import_kv(self, request_id: str, start: int, data: KvArray) -> None:
        sequence = self.scheduler.loading.get(request_id)
        if sequence is None:
            return
        tokens = data.shape[2] if data.ndim == 5 else 0
        expected = self.layout.chunk_shape(tokens)
        if data.shape != expected or data.dtype != self.layout.wire_dtype:
            raise InvalidArgument(
                f"KV of {data.dtype}{list(data.shape)} is not {self.layout.wire_dtype}{list(expected)}"
            )
        if not 0 <= start <= start + tokens <= len(sequence.group.request.prompt):
            raise InvalidArgument(f"KV of tokens [{start}, {start + tokens}) is beyond the prompt")
        # Blocks found in the pool are shared with others and final: they are never written.
        skip = max(0, sequence.computed - start)
        if skip < tokens:
            self.runner.write_kv(sequence.blocks, start + skip, data[:, :, skip:])

    def start(self, request_id: str, computed_tokens: int, exports: Collection[tuple[int, int]] = ()) -> None:
        self.scheduler.start(request_id, computed_tokens, exports)

    def abort(self, request_id: str) -> bool:
        return self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> Sequence[Event]:
        iteration = self.scheduler.schedule()
        self._swap(iteration)
        if not iteration.rows:
            return iteration.events
        try:
            sampled = self._run(iteration.batch)
        except Exception as error:
            log.exception("an iteration of %d rows failed", len(iteration.rows))
            return [*iteration.events, *self._fail(iteration, error)]
        tokens, exports = self.scheduler.complete(iteration, sampled)
        self._totals["tokens"] += len(tokens)
        return [*iteration.events, *tokens, *map(self._export, exports)]

    def _run(self, batch: Batch) -> list[list[SampledToken]]:
        began = time.perf_counter()
        sampled = self.runner.run(batch)
        tokens = sum(len(row.token_ids) for row in batch.rows)
        # What recomputing would cost is seen where prompts are computed, not where single tokens are.
        if tokens >= 4 * len(batch.rows):
            self.scheduler.swap.compute.observe(time.perf_counter() - began, tokens)
        return sampled

    def _swap(self, iteration: Iteration) -> None:
        """Saves before anything is written, then restores."""
        swap = self.scheduler.swap
        for sequence, blocks in iteration.saves:
            if saved := sequence.saved:
                began = time.perf_counter()
                saved.data = self.runner.read_kv(blocks, 0, saved.tokens)
                swap.save.observe(time.perf_counter() - began, saved.tokens)
        for sequence, start in iteration.restores:
            if (saved := sequence.saved) and saved.data is not None:
                began = time.perf_counter()
                self.runner.write_kv(sequence.blocks, start, saved.data[:, :, start:])
                swap.load.observe(time.perf_counter() - began, saved.tokens - start)
            self.scheduler.restored(sequence)

    def _export(self, export: Export) -> KvReady:
        copy = self.runner.begin_read_kv(export.block_ids, export.start, export.end - export.start)
        return KvReady(export.request_id, export.start, copy)

    def _fail(self, iteration: Iteration, error: Exception) -> list[Event]:
        request_ids = dict.fromkeys(sequence.group.request.request_id for sequence in iteration.sequences)
        for request_id in request_ids:
            self.scheduler.abort(request_id)
        return [Failed(request_id, error) for request_id in request_ids]

    def statistics(self) -> WorkerStatistics:
        scheduler, pool = self.scheduler, self.scheduler.pool
        return WorkerStatistics(
            running=scheduler.samples(scheduler.running) + scheduler.samples(scheduler.loading.values()),
            waiting=len(scheduler.waiting),
            blocks_total=pool.total,
            blocks_used=pool.used,
            blocks_cached=pool.cached,
            requests_total=self._totals["requests"],
            tokens_total=self._totals["tokens"],
            hits_total=scheduler.hit_tokens,
            misses_total=scheduler.queried_tokens - scheduler.hit_tokens,
            preemptions_total=scheduler.preemptions,
        )

    def check_integrity(self) -> list[str]:
        return self.scheduler.check_integrity()
