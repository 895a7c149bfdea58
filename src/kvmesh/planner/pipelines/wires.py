"""A link in simulated time: one message after the other, then the latency. Knows no hosts.

An express wire sends messages in frames, so decodes pass prompts: they see only each other, and every prompt under way
is held up by just the time they take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmesh.planner.pipelines.clock import Clock


class Wire:
    """`deliver(message)` is called when a message has arrived."""

    def __init__(
        self, clock: Clock, bytes_per_s: float, latency: float, deliver: Callable[[Any], None], express: bool = False
    ) -> None:
        self.clock, self.bytes_per_s, self.latency, self.deliver = clock, bytes_per_s, latency, deliver
        self.express = express
        self.free = 0.0
        self.free_for_urgent = 0.0
        self.sent_bytes = 0.0
        self._held_up = 0.0

    def send(self, message: Any, size: float, urgent: bool) -> None:
        """`size` in bytes."""
        now, seconds = self.clock.now, size / self.bytes_per_s
        self.sent_bytes += size
        if self.express and urgent:
            self.free_for_urgent = max(now, self.free_for_urgent) + seconds
            if self.free > now:
                self.free += seconds
                self._held_up += seconds
            self.clock.at(self.free_for_urgent + self.latency, self.deliver, message)
            return
        self.free = max(now, self.free, self.free_for_urgent) + seconds
        if self.express:
            self.clock.at(self.free, self._sent, (message, self._held_up))
        else:
            self.clock.at(self.free + self.latency, self.deliver, message)

    def _sent(self, parcel: tuple[Any, float]) -> None:
        """Done, unless urgent messages held it up meanwhile."""
        message, before = parcel
        if self._held_up > before:
            self.clock.at(self.clock.now + self._held_up - before, self._sent, (message, self._held_up))
        else:
            self.clock.at(self.clock.now + self.latency, self.deliver, message)
