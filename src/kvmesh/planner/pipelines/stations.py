"""A host in simulated time: what waits, and the batch it computes. Knows neither links nor routes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvmesh.planner.pipelines.clock import Clock
from kvmesh.planner.pipelines.execution import BatchTimes, Execution
from kvmesh.planner.pipelines.jobs import Job

Batch = list[Job]


class Station:
    """One batch at a time, first come first served among prompts and among decodes."""

    def __init__(
        self, clock: Clock, times: BatchTimes, execution: Execution, done: Callable[[Station, Batch], None], host: int
    ) -> None:
        self.clock, self.times, self.done, self.host = clock, times, done, host
        self.chunk = execution.chunk_tokens
        self.most = min(times.decodes, execution.decodes or times.decodes)
        self.prompts: deque[Job] = deque()
        self.decodes: deque[Job] = deque()
        self.arrived = 0
        self.busy = False
        self.seconds_busy = 0.0

    @property
    def waiting(self) -> int:
        return len(self.prompts) + len(self.decodes)

    def receive(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            (self.decodes if job.decode else self.prompts).append(job)
            self.arrived += job.tokens
        if not self.busy:
            self._start()

    def _start(self) -> None:
        batch, tokens = self._prompts()
        count = min(len(self.decodes), self.most)
        batch += [self.decodes.popleft() for _ in range(count)]
        seconds = self.times.seconds(tokens, count, self.arrived)
        self.arrived, self.busy = 0, True
        self.seconds_busy += seconds
        self.clock.at(self.clock.now + seconds, self._finish, batch)

    def _prompts(self) -> tuple[Batch, int]:
        """Whole prompts up to a number of them, or chunks up to the tokens of one."""
        batch: Batch = []
        tokens = 0
        while self.prompts and self._another(len(batch), tokens + self.prompts[0].tokens):
            job = self.prompts.popleft()
            tokens += job.tokens
            batch.append(job)
        return batch, tokens

    def _another(self, taken: int, tokens: int) -> bool:
        return taken < self.times.prompts if self.chunk is None else tokens <= self.chunk

    def _finish(self, batch: Batch) -> None:
        self.busy = False
        self.done(self, batch)
        if not self.busy and (self.prompts or self.decodes):
            self._start()
