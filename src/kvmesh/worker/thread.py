"""The engine's own thread, and the only way to it from the event loop.

    event loop ── commands ──> inbox ──> engine thread: commands, step(), commands, step() …
    event loop <── one call_soon_threadsafe for all events of a step ── engine thread

The loop never computes and the thread never waits for the loop. Commands run in the order given, between two steps.
Knows no gRPC, no store and no model.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from queue import SimpleQueue
from typing import Any, Self, TypeVar, cast

from kvmesh.engine.api import Computing, Engine, EngineRequest, Event, Failed, KvArray, KvLayout
from kvmesh.errors import Unavailable
from kvmesh.types import WorkerStatistics

log = logging.getLogger(__name__)
T = TypeVar("T")
Reply = asyncio.Future[Any]
Command = tuple[Callable[[], object], Reply]


class Subscription:
    """The events of one request, as they come; everything that is ready is taken at once."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._ready = asyncio.Event()
        self.computing_at: float | None = None
        """`time.monotonic()` at the start of the step that first computed the request."""

    async def get(self) -> list[Event]:
        """All events since the last call, at least one."""
        await self._ready.wait()
        self._ready.clear()
        events, self._events = self._events, []
        return events

    def push(self, event: Event, began: float) -> None:
        if isinstance(event, Computing):
            self.computing_at = began
        self._events.append(event)
        self._ready.set()


class EngineThread:
    """Owns an engine. Everything but `alive` belongs to the event loop that started it.

    An exception out of a step is a bug in the engine, whose state is then unknown: every subscriber gets Failed,
    further commands are refused with Unavailable, and `failed` is set, for the process to end.
    """

    def __init__(self, engine: Engine, *, stall_seconds: float = 30.0) -> None:
        self._engine = engine
        self._stall_seconds = stall_seconds
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._pending: set[Reply] = set()
        self._subscriptions: dict[str, Subscription] = {}
        self._busy_since: float | None = None
        self._ended: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the thread after the step it is in; one that hangs is left behind (it is a daemon)."""
        self._end(Unavailable("the engine is stopped"))
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, 5.0)

    # For the event loop ------------------------------------------------------------------------------------------

    @property
    def layout(self) -> KvLayout:
        return self._engine.layout

    @property
    def alive(self) -> bool:
        """False if the engine failed, or has not come out of one step for `stall_seconds`."""
        since = self._busy_since
        return self._ended is None and (since is None or time.monotonic() - since < self._stall_seconds)

    def subscribe(self, request_id: str) -> Subscription:
        """Events of the request from now on."""
        return self._subscriptions.setdefault(request_id, Subscription())

    def unsubscribe(self, request_id: str) -> None:
        self._subscriptions.pop(request_id, None)

    async def add(self, request: EngineRequest) -> None:
        await self._call(functools.partial(self._engine.add, request))

    async def import_kv(self, request_id: str, start: int, data: KvArray) -> None:
        await self._call(functools.partial(self._engine.import_kv, request_id, start, data))

    async def start(self, request_id: str, computed_tokens: int, exports: Collection[tuple[int, int]] = ()) -> None:
        await self._call(functools.partial(self._engine.start, request_id, computed_tokens, exports))

    async def abort(self, request_id: str) -> bool:
        return await self._call(functools.partial(self._engine.abort, request_id))

    def abort_soon(self, request_id: str) -> None:
        """Aborts without waiting: after every earlier command and before every later one. Never raises."""
        if self._ended is None:
            self._post(functools.partial(self._engine.abort, request_id))

    async def statistics(self) -> WorkerStatistics:
        return await self._call(self._engine.statistics)

    async def check_integrity(self) -> list[str]:
        return await self._call(self._engine.check_integrity)

    async def _call(self, function: Callable[[], T]) -> T:
        if self._ended is not None:
            raise self._ended
        return cast(T, await self._post(function))

    def _post(self, function: Callable[[], object]) -> Reply:
        reply: Reply = self._loop.create_future()
        self._pending.add(reply)
        reply.add_done_callback(self._pending.discard)
        self._inbox.put((function, reply))
        return reply

    def _settle(self, results: Sequence[tuple[Reply, object, Exception | None]]) -> None:
        for reply, value, error in results:
            if reply.done():
                continue
            if error is None:
                reply.set_result(value)
            else:
                reply.set_exception(error)
                reply.exception()  # A reply that nobody awaits is no news.

    def _deliver(self, events: Sequence[Event], began: float) -> None:
        for event in events:
            if subscription := self._subscriptions.get(event.request_id):
                subscription.push(event, began)

    def fail(self, error: Exception) -> None:
        """Gives up on the engine; what an exception out of a step leads to."""
        self._end(Unavailable(f"the engine failed: {error!r}"))
        for request_id, subscription in self._subscriptions.items():
            subscription.push(Failed(request_id, Unavailable(f"the engine failed: {error!r}")), 0.0)
        self.failed.set()

    def _end(self, reason: Exception) -> None:
        self._ended = self._ended or reason
        self._settle([(reply, None, self._ended) for reply in list(self._pending)])

    # In the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while None not in (commands := self._take()):
                if commands:
                    self._tell(self._settle, [self._execute(*command) for command in commands if command])
                self._step()
        except Exception as error:
            log.exception("the engine failed")
            self._tell(self.fail, error)

    def _take(self) -> list[Command | None]:
        """Everything in the inbox; waits for something if there is nothing else to do. None ends the thread."""
        commands: list[Command | None] = []
        if not self._engine.has_work():
            self._busy_since = None
            commands.append(self._inbox.get())
        self._busy_since = time.monotonic()
        while not self._inbox.empty():
            commands.append(self._inbox.get())
        return commands

    def _execute(self, function: Callable[[], object], reply: Reply) -> tuple[Reply, object, Exception | None]:
        try:
            return reply, function(), None
        except Exception as error:
            return reply, None, error

    def _step(self) -> None:
        if self._engine.has_work():
            began = time.monotonic()
            events = self._engine.step()
            if events:
                self._tell(self._deliver, events, began)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("the event loop has ended before the engine")
