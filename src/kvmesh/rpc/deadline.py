"""A point in time by which something must have ended, passed from hop to hop.

Knows the monotonic clock and what grpc says of the time a call has left; nothing of retries or cancellation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import grpc.aio


@dataclass(frozen=True, slots=True, order=True)
class Deadline:
    """`at` is a reading of `time.monotonic()`, in seconds; it may lie in the past."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left, never less than 0: fit for a grpc timeout."""
        return max(0.0, self.at - time.monotonic())

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.at

    def earlier(self, seconds: float) -> Deadline:
        """The same less a margin, so that a hop can still answer after the one behind it gave up."""
        return Deadline(self.at - seconds)


def deadline_of(context: grpc.aio.ServicerContext[Any, Any], default: float) -> Deadline:
    """The caller's deadline, or `default` seconds from now if it set none."""
    remaining: float | None = context.time_remaining()
    return Deadline.after(default if remaining is None else remaining)
