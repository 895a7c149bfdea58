"""What a simulated run showed: tokens, latencies, how busy hosts were, and what the simulation itself cost."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean

from kvmesh.planner.pipelines.stations import Station


@dataclass(slots=True)
class Outcome:
    """Counted from `measured_from` on. A prompt's latency ends with its last layer, a decode's with one more token."""

    measured_from: float
    seconds: float = 0.0
    prompt_latencies: list[float] = field(default_factory=list)
    decode_latencies: list[float] = field(default_factory=list)
    finished: int = 0
    turned_away: int = 0
    events: int = 0
    cpu_seconds: float = 0.0
    busy: dict[int, float] = field(default_factory=dict)
    """Share of all simulated time in which a host computed."""
    _started: float = field(default_factory=time.process_time)

    def record(self, now: float, latency: float, decode: bool) -> None:
        if now >= self.measured_from:
            (self.decode_latencies if decode else self.prompt_latencies).append(latency)

    def close(self, now: float, events: int, stations: Iterable[Station]) -> None:
        self.seconds, self.events = now - self.measured_from, events
        self.busy = {station.host: station.seconds_busy / now for station in stations}
        self.cpu_seconds = time.process_time() - self._started

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens."""
        return len(self.decode_latencies) / self.seconds

    @property
    def prompt_seconds(self) -> float:
        return fmean(self.prompt_latencies or [0.0])

    @property
    def decode_seconds(self) -> float:
        return fmean(self.decode_latencies or [0.0])

    @property
    def events_per_s(self) -> float:
        """Simulated events in a second of this machine's time."""
        return self.events / self.cpu_seconds if self.cpu_seconds else 0.0
