"""Feeds the engine's counters to the metrics: gauges as they are, counters by what they grew. Knows no clock."""

from __future__ import annotations

from kvmesh.telemetry import Metrics
from kvmesh.types import WorkerStatistics


class Meter:
    """One per process; `observe` it as often as readings are wanted."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last = WorkerStatistics()

    def observe(self, now: WorkerStatistics) -> None:
        last, self._last = self._last, now
        metrics = self._metrics
        metrics.observe(now)
        queried = now.hits_total + now.misses_total - last.hits_total - last.misses_total
        metrics.prefix_cache_queries.add(queried)
        metrics.prefix_cache_hits.add(now.hits_total - last.hits_total)
        metrics.prompt_tokens.add(queried)
        metrics.generation_tokens.add(now.tokens_total - last.tokens_total)
        metrics.num_preemptions.add(now.preemptions_total - last.preemptions_total)
