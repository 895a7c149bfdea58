"""Work that outlives the request that caused it: bounded, tracked, awaited at shutdown.

A client that goes away cancels its request's task; what must still be said to workers is said from here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Janitor:
    """`patience`: seconds that each job may take."""

    def __init__(self, patience: float = 5.0) -> None:
        self._patience = patience
        self._jobs: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._jobs)

    def take(self, what: str, job: Coroutine[Any, Any, object]) -> None:
        """Does the job in the background; a failure is logged."""
        task = asyncio.create_task(self._do(what, job), name=what)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def close(self) -> None:
        """Waits until all jobs are done."""
        while self._jobs:
            await asyncio.wait(set(self._jobs))

    async def _do(self, what: str, job: Coroutine[Any, Any, object]) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await job
        except Exception as error:
            logger.warning("%s failed: %s", what, str(error) or type(error).__name__)
