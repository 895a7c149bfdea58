"""What the store says of itself: a reading for whoever asks, and the same for the metrics. Knows no I/O."""

from __future__ import annotations

import time
from dataclasses import replace

from kvmesh.telemetry import Metrics
from kvmesh.types import WorkerStatistics
from kvmesh_kvstore.store import ChunkStore, Counters


class Meter:
    """Hits and misses are those of chunks asked for by GetChunks; damaged ones are misses."""

    def __init__(self, store: ChunkStore, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics
        self._last = Counters()
        self._started = time.monotonic()

    def read(self) -> WorkerStatistics:
        store, counters = self._store, self._store.counters
        return WorkerStatistics(
            leases=len(store.leases),
            chunks=len(store),
            memory_bytes=store.memory.used,
            disk_bytes=store.disk.used,
            raw_bytes=store.raw_bytes,
            chunks_by_quality=dict(store.qualities),
            requests_total=counters.hits + counters.misses,
            hits_total=counters.hits,
            misses_total=counters.misses,
            uptime_seconds=time.monotonic() - self._started,
        )

    def observe(self) -> None:
        """Feeds the metrics: gauges as they are, counters by what they grew."""
        now, last = self._store.counters, self._last
        metrics = self._metrics
        metrics.observe(self.read())
        metrics.chunk_queries.add(now.hits + now.misses - last.hits - last.misses)
        metrics.chunk_hits.add(now.hits - last.hits)
        metrics.chunk_corruptions.add(now.damaged - last.damaged)
        self._last = replace(now)
