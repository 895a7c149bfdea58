"""One running request as seen from outside: its id, its deadline, and the one way to wait.

Whatever a request waits for, it waits through `Session.wait`, which ends on success, silence, the deadline or Abort;
cancellation by the client passes through as CancelledError. Knows nothing of what is waited for.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kvmesh.errors import AlreadyExists, DeadlineExceeded, Unavailable
from kvmesh.rpc.deadline import Deadline

T = TypeVar("T")


class RequestAborted(Exception):
    """Someone called Abort."""


class Silent(Unavailable):
    """Nothing came for too long: whoever was to speak is taken for lost."""


class Session:
    def __init__(self, request_id: str, deadline: Deadline) -> None:
        self.request_id = request_id
        self.deadline = deadline
        self.aborted = False
        self._timeout: asyncio.Timeout | None = None

    async def wait(self, awaitable: Awaitable[T], seconds: float = math.inf, what: str = "it") -> T:
        """Waits for at most `seconds`.

        Raises:
            Silent: `seconds` have passed.
            DeadlineExceeded: the deadline has passed.
            RequestAborted: abort() was called.
        """
        timeout = asyncio.timeout(0 if self.aborted else min(seconds, self.deadline.remaining()))
        try:
            async with timeout:
                self._timeout = timeout
                return await awaitable
        except TimeoutError:
            if not timeout.expired():
                raise
        finally:
            self._timeout = None
        self.check()
        raise Silent(f"{what} was silent for {seconds:g} s")

    def check(self) -> None:
        """Raises RequestAborted or DeadlineExceeded if it is time to."""
        if self.aborted:
            raise RequestAborted
        if self.deadline.expired:
            raise DeadlineExceeded("the deadline passed before the request was finished")

    def abort(self) -> None:
        """Ends the present wait and all later ones. Idempotent."""
        self.aborted = True
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())


class Sessions:
    """The running requests by id."""

    def __init__(self) -> None:
        self._running: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._running)

    @contextmanager
    def open(self, request_id: str, deadline: Deadline) -> Iterator[Session]:
        """
        Raises:
            AlreadyExists: a request of this id is running.
        """
        if request_id in self._running:
            raise AlreadyExists(f"request {request_id!r} is running")
        session = self._running[request_id] = Session(request_id, deadline)
        try:
            yield session
        finally:
            del self._running[request_id]

    def abort(self, request_id: str) -> bool:
        """False: no such request is running. Idempotent."""
        session = self._running.get(request_id)
        if session is not None:
            session.abort()
        return session is not None
