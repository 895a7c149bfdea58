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
        self._observe_kv(last, now)
        if now.power_domain:
            metrics.power_watts.set(now.power_watts, {"domain": now.power_domain})
            spent = max(0.0, now.energy_joules_total - last.energy_joules_total)
            metrics.energy_joules.add(spent, {"domain": now.power_domain})

    def _observe_kv(self, last: WorkerStatistics, now: WorkerStatistics) -> None:
        metrics = self._metrics
        metrics.kv_fetched_bytes.add(now.fetched_bytes_total - last.fetched_bytes_total)
        metrics.kv_published_bytes.add(now.published_bytes_total - last.published_bytes_total)
        metrics.kv_missed_chunks.add(now.missed_chunks_total - last.missed_chunks_total)
        metrics.kv_missed_replicas.add(now.missed_replicas_total - last.missed_replicas_total)
        metrics.kv_recomputed_tokens.add(now.recomputed_tokens_total - last.recomputed_tokens_total)
        for quality, chunks in now.chunks_by_quality.items():
            metrics.kv_fetched_chunks.add(chunks - last.chunks_by_quality.get(quality, 0), {"quality": quality})
