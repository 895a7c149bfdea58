"""Work that goes on beside a block of code, and ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

INSIST_SECONDS = 0.5


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """Runs `work` until the block is left; an exception of the work is raised there.

    Cancels until the work obeys: redis-py swallows a cancellation while it connects.
    """
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=INSIST_SECONDS)
        if not task.cancelled():
            task.result()
