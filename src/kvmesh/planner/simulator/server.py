"""An instance in time: it runs its engine's iterations one after the other, and wakes when something comes.

What arrives during an iteration is seen by the next. Knows the clock and whom to tell; not why a request came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvmesh.engine.api import Admitted, Computing, Event, TokenOutput
from kvmesh.planner.simulator.deployment import Arrival, Instance
from kvmesh.planner.simulator.engine import Engine
from kvmesh.planner.simulator.outcome import Usage
from kvmesh.planner.simulator.run import Run


class World(Protocol):
    """What a server needs of the simulation."""

    @property
    def now(self) -> float: ...

    def at(self, when: float, then: Callable[[], None]) -> None: ...

    def on_admitted(self, server: Server, event: Admitted) -> None: ...

    def on_computing(self, event: Computing) -> None: ...

    def on_token(self, server: Server, event: TokenOutput) -> None: ...


class Server:
    """One instance at work."""

    def __init__(self, instance: Instance, world: World, max_waiting: int, literal: bool) -> None:
        self.instance = instance
        self.worker = instance.worker
        self.engine = Engine(instance, max_waiting, literal)
        self.load = (0.0, 0.0)
        """Sequences that decode, and their tokens of context, when the last run began."""
        self._world = world
        self._run: Run | None = None
        self._usage = Usage(instance.name, instance.blocks)

    def add(
        self,
        number: int,
        arrival: Arrival,
        *,
        prefill_only: bool = False,
        prefilled: bool = False,
        stored: bool = False,
    ) -> None:
        """See `Engine.add`."""
        self.engine.add(number, arrival, prefill_only=prefill_only, prefilled=prefilled, stored=stored)
        self._wake()

    def start(self, number: int, tokens: int) -> None:
        """See `Engine.start`."""
        self.engine.start(number, tokens)
        self._wake()

    def release(self, number: int) -> None:
        """See `Engine.release`."""
        if self.engine.release(number):
            self._wake()

    def usage(self) -> Usage:
        self._usage.preemptions = self.engine.scheduler.preemptions
        return self._usage

    def _wake(self) -> None:
        """Begins at once if idle; a run under way ends with its present iteration."""
        if self._run is None:
            self._begin()
        elif self._run.cut(self._world.now):
            self._due(self._run)

    def _begin(self) -> None:
        self._run, events = self.engine.plan(self._world.now)
        self._usage.peak_blocks = max(self._usage.peak_blocks, self.engine.scheduler.pool.used)
        if self._run:
            self.load = (self._run.decodes, self._run.context)
            self._due(self._run)
        self._tell(events)

    def _due(self, run: Run) -> None:
        count = len(run.ends)
        self._world.at(run.ends[-1], lambda: self._finish(run, count))

    def _finish(self, run: Run, count: int) -> None:
        """Unless the run was cut shorter, and is over already."""
        if run is self._run and count == len(run.ends):
            self._account(run)
            events = self.engine.finish(run)
            self._tell(events)
            self._begin()

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case TokenOutput():
                    self._world.on_token(self, event)
                case Admitted():
                    self._world.on_admitted(self, event)
                case Computing():
                    self._world.on_computing(event)

    def _account(self, run: Run) -> None:
        usage, count = self._usage, len(run.ends)
        usage.busy += run.ends[-1] - run.began
        usage.batch_seconds += (run.ends[-1] - run.began) * run.decodes
        usage.iterations += count
        usage.output_tokens += count * run.decodes
        usage.prompt_tokens += count * sum(tokens for _, tokens in run.chunks)
