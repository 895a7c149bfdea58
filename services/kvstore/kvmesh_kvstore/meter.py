"""What the store says of itself: a reading for whoever asks, and the same for the metrics. Knows no I/O."""

from __future__ import annotations

import time
from dataclasses import replace

from kvmesh.telemetry import Metrics
from kvmesh.types import TierCounts, WorkerStatistics
from kvmesh_kvstore.chunks import Tier
from kvmesh_kvstore.remote import RemoteTier
from kvmesh_kvstore.store import ChunkStore, Counters


class Meter:
    """Hits and misses are those of chunks asked for by GetChunks; damaged ones are misses."""

    def __init__(self, store: ChunkStore, metrics: Metrics, remote: RemoteTier | None = None) -> None:
        self._store, self._metrics, self._remote = store, metrics, remote
        self._last, self._last_tiers = Counters(), dict[str, TierCounts]()
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
            tiers=self._tiers(),
            uptime_seconds=time.monotonic() - self._started,
        )

    def observe(self) -> None:
        """Feeds the metrics: gauges as they are, counters by what they grew."""
        now, last = self._store.counters, self._last
        metrics, reading = self._metrics, self.read()
        metrics.observe(reading)
        metrics.chunk_queries.add(now.hits + now.misses - last.hits - last.misses)
        metrics.chunk_hits.add(now.hits - last.hits)
        metrics.chunk_corruptions.add(now.damaged - last.damaged)
        for tier, counts in reading.tiers.items():
            self._observe_tier(tier, counts, self._last_tiers.get(tier, TierCounts()))
        self._last, self._last_tiers = replace(now), reading.tiers

    def _tiers(self) -> dict[str, TierCounts]:
        """Copies, of the tiers that there are."""
        counts = {shelf.tier: shelf.counters for shelf in self._store.shelves if shelf.budget}
        counts |= {Tier.REMOTE: self._remote.counters} if self._remote else {}
        names = TierCounts.__dataclass_fields__
        return {str(tier): TierCounts(**{name: getattr(each, name) for name in names}) for tier, each in counts.items()}

    def _observe_tier(self, tier: str, now: TierCounts, last: TierCounts) -> None:
        metrics = self._metrics
        metrics.tier_hits.add(now.hits - last.hits, {"tier": tier})
        metrics.tier_misses.add(now.misses - last.misses, {"tier": tier})
        metrics.tier_read_bytes.add(now.read_bytes - last.read_bytes, {"tier": tier})
        metrics.tier_evictions.add(now.evictions - last.evictions, {"tier": tier})
