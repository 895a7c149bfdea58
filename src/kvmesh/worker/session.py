"""The requests that run in this process: each has a session, from its first engine command to its last trace.

However a session ends (done, cancelled, aborted, late, failed, drained) the engine forgets the request; what else was
taken is given back by the context managers inside it. Knows no proto and no store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvmesh.engine.api import Admitted, Event, Failed
from kvmesh.errors import Aborted, AlreadyExists, DeadlineExceeded, KvmeshError, Unavailable
from kvmesh.rpc.deadline import Deadline
from kvmesh.worker.thread import EngineThread, Subscription

DRAINING = "the worker is draining"


class Session:
    """One running request, seen from the event loop."""

    def __init__(self, task: asyncio.Task[object], subscription: Subscription) -> None:
        self._task = task
        self._subscription = subscription
        self._backlog: list[Event] = []
        self.closed = asyncio.Event()
        self.ended_by: KvmeshError | None = None

    @property
    def computing_at(self) -> float | None:
        return self._subscription.computing_at

    async def admitted(self) -> Admitted:
        """Waits until the request's blocks are reserved."""
        first, *self._backlog = await self.events()
        assert isinstance(first, Admitted), first
        return first

    async def events(self) -> list[Event]:
        """Everything that is ready, at least one event.

        Raises:
            KvmeshError: the engine gave up on the request.
        """
        events, self._backlog = self._backlog or await self._subscription.get(), []
        for event in events:
            if isinstance(event, Failed):
                raise _as_kvmesh_error(event.error)
        return events

    def end(self, error: KvmeshError) -> None:
        """Makes the request's own task leave the session with `error`."""
        if self.ended_by is None and not self.closed.is_set():
            self.ended_by = error
            self._task.cancel()

    def left_by_cancellation(self) -> KvmeshError | None:
        """What to raise in place of CancelledError; None if somebody else cancelled."""
        if self.ended_by is None or self._task.uncancel():
            return None
        return self.ended_by


def _as_kvmesh_error(error: Exception) -> KvmeshError:
    return error if isinstance(error, KvmeshError) else Unavailable(f"the engine failed: {error!r}")


class Sessions:
    """The table of running requests, by id."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine
        self._sessions: dict[str, Session] = {}
        self._draining = False

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def draining(self) -> bool:
        return self._draining

    @asynccontextmanager
    async def open(self, request_id: str, deadline: Deadline) -> AsyncIterator[Session]:
        """Everything that the current task does for the request.

        Raises:
            Unavailable: draining, or the drain's grace is over.
            AlreadyExists: the id is running here.
            Aborted: `abort` was called.
            DeadlineExceeded: the deadline passed.
        """
        session = self._enter(request_id)
        try:
            async with asyncio.timeout(deadline.remaining()) as timeout:
                yield session
        except TimeoutError:
            if timeout.expired():
                raise DeadlineExceeded(f"request {request_id} did not end by its deadline") from None
            raise
        except asyncio.CancelledError:
            if error := session.left_by_cancellation():
                raise error from None
            raise
        finally:
            self._leave(request_id)

    async def abort(self, request_id: str) -> bool:
        """Ends the request and waits until nothing is held for it; False if there is none. Idempotent."""
        session = self._sessions.get(request_id)
        if session is None:
            return False
        session.end(Aborted(f"request {request_id} was aborted"))
        await session.closed.wait()
        return True

    def refuse(self) -> None:
        """Takes no new request from now on."""
        self._draining = True

    async def drain(self, grace: float) -> None:
        """Takes no new request; what runs has `grace` seconds, then ends with Unavailable."""
        self.refuse()
        closed = [asyncio.create_task(session.closed.wait()) for session in self._sessions.values()]
        if not closed:
            return
        await asyncio.wait(closed, timeout=grace)
        for session in list(self._sessions.values()):
            session.end(Unavailable(DRAINING))
        await asyncio.wait(closed)

    def _enter(self, request_id: str) -> Session:
        if self._draining:
            raise Unavailable(DRAINING)
        if request_id in self._sessions:
            raise AlreadyExists(f"request {request_id} is running here")
        task = asyncio.current_task()
        assert task is not None
        session = self._sessions[request_id] = Session(task, self._engine.subscribe(request_id))
        return session

    def _leave(self, request_id: str) -> None:
        self._engine.unsubscribe(request_id)
        self._engine.abort_soon(request_id)
        self._sessions.pop(request_id).closed.set()
