"""Waiting for admission: the event-loop side of `kvmesh.scheduling.admission`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Hashable, Iterable
from contextlib import asynccontextmanager

from kvmesh.errors import Overloaded
from kvmesh.scheduling.admission import Admission, Queued, Refused
from kvmesh_router.session import Session


class Gate:
    """Lets sessions in one by one, as `Admission` decides."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self._waiting: dict[Hashable, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def enter(self, session: Session, low_priority: bool = False) -> AsyncIterator[None]:
        """Holds a place while the block runs.

        Raises:
            Overloaded: the queue is full, or the deadline comes before the turn.
            DeadlineExceeded, RequestAborted: while waiting.
        """
        decision = self.admission.submit(session, time.monotonic(), session.deadline.at, low_priority)
        if isinstance(decision, Refused):
            raise Overloaded(decision.why or "the router has no room for another request", decision.retry_after)
        try:
            if isinstance(decision, Queued):
                turn = self._waiting[session] = asyncio.get_running_loop().create_future()
                await session.wait(turn)
            yield
        finally:
            self._waiting.pop(session, None)
            self._let_in(self.admission.finish(session, time.monotonic()))

    def narrow(self, limit: int | None, low_limit: int | None) -> None:
        """See `Admission.narrow`."""
        self._let_in(self.admission.narrow(limit, low_limit, time.monotonic()))

    def _let_in(self, sessions: Iterable[Hashable]) -> None:
        for session in sessions:
            turn = self._waiting.pop(session, None)
            if turn is not None and not turn.done():
                turn.set_result(None)
