"""What the `__main__` of a service does: read the config, run until told to stop, drain.

Exit status: 0 after SIGTERM or SIGINT, 1 if it could not start or go on, 2 for a bad config, SUPERSEDED if a younger
process has taken its worker_id: a supervisor should not start it again, for the two would take turns.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import NoReturn, Protocol, TypeVar

from kvmesh.errors import KvmeshError, Unavailable
from kvmesh.loop import run
from kvmesh.process.config import ProcessConfig, read
from kvmesh.types import WorkerInfo

SUPERSEDED = 3
log = logging.getLogger(__name__)
C = TypeVar("C", bound=ProcessConfig)


class Running(Protocol):
    """A service that is registered and serves."""

    @property
    def info(self) -> WorkerInfo: ...

    @property
    def superseded(self) -> asyncio.Event:
        """A younger process has its worker_id: nobody is sent to this one any more."""

    async def failed(self) -> None:
        """Returns when the service is beyond help; that may be never."""

    async def drain(self, grace: float) -> None:
        """Takes no new work, leaves the registry, lets what runs end within `grace` seconds."""


async def never() -> None:
    """For a service that cannot fail but by ending."""
    await asyncio.Event().wait()


def main(config_type: type[C], start: Callable[[C], AbstractAsyncContextManager[Running]]) -> NoReturn:
    """Runs what `start` makes of the environment's config, to its end."""
    config = read(config_type)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        status = run(serve_until_signalled(start(config), config.drain_grace))
    except KvmeshError as error:
        sys.exit(f"cannot serve: {error}")
    sys.exit(status)


async def serve_until_signalled(service: AbstractAsyncContextManager[Running], grace: float) -> int:
    """Serves until SIGTERM, SIGINT or superseded, then drains; a signal before it serves ends it at once.

    Returns the exit status.

    Raises:
        Unavailable: the service failed.
        KvmeshError: it could not start.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        starting = asyncio.create_task(stack.enter_async_context(service))
        await _first(starting, stop.wait())
        if stop.is_set():
            starting.cancel()
            await asyncio.wait([starting])
            return 0
        process = await starting
        log.info("%s serves at %s", process.info.worker_id, process.info.address)
        await _first(stop.wait(), process.superseded.wait(), process.failed())
        if not stop.is_set() and not process.superseded.is_set():
            raise Unavailable("the service failed; the log says how")
        if process.superseded.is_set():
            log.error("%s was superseded: it finishes what runs and ends", process.info.worker_id)
        await process.drain(grace)
        return SUPERSEDED if process.superseded.is_set() else 0


async def _first(*awaitables: Awaitable[object]) -> None:
    """Returns when one of them is done; tasks among them are left running."""
    waiting = [asyncio.ensure_future(each) for each in awaitables]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task, given in zip(waiting, awaitables, strict=True):
        if task is not given:
            task.cancel()
