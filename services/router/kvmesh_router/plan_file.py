"""Follows a plan file: read at the start, and again whenever it changes.

A file that cannot be read or is no plan is said once in the log; the plan before it stays. Who does what follows from
the plan is the policy's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvmesh.background import background
from kvmesh.errors import InvalidArgument
from kvmesh.scheduling.policy import Policy
from kvmesh.scheduling.serving_plan import ServingPlan, parse
from kvmesh.types import WorkerInfo

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


@dataclass(slots=True)
class PlanFile:
    """`workers`: who is in the mesh, to say whose process cannot do what the plan wants."""

    path: Path
    policy: Policy
    workers: Callable[[], Iterable[WorkerInfo]]
    _seen: tuple[int, int] = field(default=(0, 0))

    async def read(self) -> None:
        """Follows what the file says now.

        Raises:
            InvalidArgument: it cannot be read, or is no plan.
        """
        self._seen, plan = await asyncio.to_thread(_read, self.path)
        self.policy.follow(plan)
        unmet = plan.phases.unmet(self.workers())
        logger.info("following the plan %s for %d workers", self.path, len(plan.phases.planned))
        if unmet:
            logger.warning("only mixed workers change their phase; these stay as they are: %s", ", ".join(unmet))

    async def refresh(self) -> None:
        """Reads the file if it changed; a bad one leaves the plan as it is."""
        changed = await asyncio.to_thread(_version, self.path)
        if changed == self._seen:
            return
        self._seen = changed
        try:
            await self.read()
        except InvalidArgument as error:
            logger.error("keeping the plan as it was: %s", error)

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Follows the file until the block is left.

        Raises:
            InvalidArgument: as `read`, at the start.
        """
        await self.read()
        async with background(self._keep_polling(), "plan"):
            yield

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.refresh()


def _version(path: Path) -> tuple[int, int]:
    """Changes with the file; zeros if there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _read(path: Path) -> tuple[tuple[int, int], ServingPlan]:
    version = _version(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"the plan {path} cannot be read: {error}") from error
    return version, parse(text, f"the plan {path}")
