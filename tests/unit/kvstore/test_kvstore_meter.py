"""What the metrics are told of tiers: each read, byte and eviction once, however often the meter is read."""

from collections import Counter

from kvmesh.telemetry import Metrics
from kvmesh.telemetry.metrics import NoopInstrument, NoopInstruments
from kvmesh_kvstore.chunks import Tier
from kvmesh_kvstore.meter import Meter
from kvmesh_kvstore.remote import RemoteTier
from kvmesh_kvstore.store import ChunkStore


class Recorded(NoopInstrument):
    def __init__(self) -> None:
        self.by_tier: Counter[str] = Counter()

    def add(self, amount, attributes=None) -> None:
        self.by_tier[(attributes or {}).get("tier", "")] += amount


class Recording(NoopInstruments):
    def counter(self, name, description):
        return Recorded()


def test_each_tier_is_counted_once():
    store, remote, metrics = ChunkStore(10, 10), RemoteTier(None, 1 << 20), Metrics(Recording())
    meter = Meter(store, metrics, remote)
    for tier in (Tier.MEMORY, Tier.DISK, Tier.DISK, None):
        store.count_read(tier, 7)
        meter.observe()
        meter.observe()
    remote.counters.found(9)
    remote.counters.evictions += 2
    meter.observe()
    assert metrics.tier_hits.by_tier == {"memory": 1, "disk": 2, "remote": 1}
    assert metrics.tier_misses.by_tier == {"memory": 3, "disk": 1, "remote": 0}
    assert metrics.tier_read_bytes.by_tier == {"memory": 7, "disk": 14, "remote": 9}
    assert metrics.tier_evictions.by_tier == {"memory": 0, "disk": 0, "remote": 2}


def test_a_tier_that_is_off_is_not_counted():
    store = ChunkStore(10)
    store.count_read(None, 0)
    tiers = Meter(store, Metrics(NoopInstruments())).read().tiers
    assert {name: counts.misses for name, counts in tiers.items()} == {"memory": 1}
