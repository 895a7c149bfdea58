"""What is known of the mesh's workers at this moment, without asking anyone.

Knows the registry; who may use which worker is for schedulers. While Redis is away the last known list stands, and
after it came back (perhaps empty) a worker has one ttl to register again before it is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress

from kvmesh.background import background
from kvmesh.errors import Unavailable
from kvmesh.registry.client import Registry, Snapshot
from kvmesh.types import Role, WorkerInfo

logger = logging.getLogger(__name__)

Callback = Callable[[list[WorkerInfo]], None]


class StaticDirectory:
    """A list of workers that changes when told to; the interface of Directory, and a fake for tests."""

    def __init__(self, workers: Sequence[WorkerInfo] = ()) -> None:
        self.available = True
        """The registry answered last time."""
        self._workers = tuple(workers)
        self._callbacks: list[Callback] = []
        self._changed = asyncio.Event()

    def workers(self, role: Role | None = None) -> list[WorkerInfo]:
        """Last known, by worker_id; all roles if none is given."""
        return [info for info in self._workers if role is None or info.role is role]

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Calls back with all workers at each change, from the event loop; returns what ends it."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback) if callback in self._callbacks else None

    async def wait_for_change(self, timeout: float | None = None) -> bool:
        """False if nothing changed for `timeout` seconds."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout)
            return True
        return False

    def set(self, workers: Sequence[WorkerInfo]) -> None:
        """Replaces the list and tells the subscribers if it is another."""
        if tuple(workers) == self._workers:
            return
        self._workers = tuple(workers)
        self._changed.set()
        self._changed = asyncio.Event()
        for callback in list(self._callbacks):
            try:
                callback(list(self._workers))
            except Exception:
                logger.exception("a subscriber of the directory failed")

    async def refresh(self) -> None:
        """Asks the registry now, if there is one."""

    async def __aenter__(self) -> StaticDirectory:
        return self

    async def __aexit__(self, *exc_info: object) -> None: ...


class Directory(StaticDirectory):
    """Asks the registry every `poll` seconds while entered; entering waits for the first answer."""

    def __init__(self, registry: Registry, poll: float = 1.0) -> None:
        super().__init__()
        self.available = False
        self._registry = registry
        self._poll = poll
        self._generation: str | None = None
        self._keep_until = 0.0
        self._stack = AsyncExitStack()

    async def refresh(self) -> None:
        try:
            snapshot = await self._registry.snapshot()
        except Unavailable as error:
            if self.available:
                logger.warning("serving on with the %d workers last known: %s", len(self._workers), error)
            self.available = False
            return
        self.set(self._merged(snapshot))
        self.available = True

    async def __aenter__(self) -> Directory:
        await self.refresh()
        await self._stack.enter_async_context(background(self._keep_polling(), "directory"))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(self._poll)
            await self.refresh()

    def _merged(self, snapshot: Snapshot) -> list[WorkerInfo]:
        """What Redis holds, and who may not have had the time to register again."""
        if not self.available or snapshot.generation != self._generation:
            self._keep_until = time.monotonic() + self._registry.ttl
        self._generation = snapshot.generation
        known = {info.worker_id: info for info in self._workers} if time.monotonic() < self._keep_until else {}
        known |= {info.worker_id: info for info in snapshot.workers}
        return [known[worker_id] for worker_id in sorted(known)]
