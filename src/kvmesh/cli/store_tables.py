"""How stores and their chunks look in a terminal or as JSON. Pure: from the messages of `kvstore.proto` to text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from rich.table import Table

from kvmesh.types import TierCounts

if TYPE_CHECKING:
    from kvmesh.v1 import kvstore_pb2 as pb

Tiers = Mapping[str, "pb.GetTiersResponse"]
Chunks = Mapping[str, Sequence["pb.StoredChunk"]]

TIER_COLUMNS = (
    "store", "tier", "chunks", "used", "budget", "hit rate", "hits", "misses", "read", "admissions", "evictions",
    "errors",
)  # fmt: skip
CHUNK_COLUMNS = ("key", "store", "tier", "size", "raw", "layers", "leases", "seen", "tenant", "namespace")
SHORT = 12
"""Digits that tell fingerprints and tenants apart for people."""


def size(count: float) -> str:
    """Three digits and a binary unit: '512 B', '1.50 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def savings_of(raw: int, stored: int) -> str:
    """What the codecs save: '1.50 GiB (4.2×)'; '-' where nothing is stored."""
    return f"{size(raw - stored)} ({raw / stored:.1f}×)" if stored and raw > stored else "-" if not stored else "none"


def qualities(counts: Mapping[str, int]) -> str:
    """'transform:3 ×12, raw ×2'; '-' for none."""
    return ", ".join(f"{name} ×{count}" for name, count in sorted(counts.items(), key=lambda c: -c[1])) or "-"


def reads_of(tiers: Mapping[str, TierCounts]) -> str:
    """Of each tier hits, misses and bytes read: 'memory 12/3 1.5 MiB, remote 1/2 8 KiB'; '-' for none."""
    return ", ".join(f"{name} {t.hits}/{t.misses} {size(t.read_bytes)}" for name, t in tiers.items()) or "-"


def tiers_table(tiers: Tiers) -> Table:
    table = Table(*TIER_COLUMNS, box=None, pad_edge=False)
    for store, reading in tiers.items():
        for tier in reading.tiers:
            reads = tier.hits + tier.misses
            rate = f"{tier.hits / reads:.1%}" if reads else "-"
            found = (str(tier.hits), str(tier.misses), size(tier.read_bytes))
            counts = (tier.admissions, tier.evictions, tier.errors)
            sizes = (size(tier.used_bytes), size(tier.budget_bytes))
            table.add_row(store, _tier(tier.tier), str(tier.chunks), *sizes, rate, *found, *map(str, counts))
    return table


def savings(tiers: Tiers) -> str:
    """One line of what all stores hold together, in memory and on disk."""
    stored = sum(
        tier.used_bytes for reading in tiers.values() for tier in reading.tiers if _tier(tier.tier) != "remote"
    )
    raw = sum(reading.raw_bytes for reading in tiers.values())
    counts: Counter[str] = Counter()
    for reading in tiers.values():
        counts.update(reading.chunks_by_quality)
    hits, misses, damaged = (sum(getattr(r, name) for r in tiers.values()) for name in ("hits", "misses", "damaged"))
    return (
        f"saved {savings_of(raw, stored)} · {qualities(counts)} · "
        f"{hits} hits, {misses} misses, {damaged} damaged"
    )  # fmt: skip


def tenants_table(tiers: Tiers) -> Table:
    """All stores together, the largest first."""
    chunks: Counter[bytes] = Counter()
    used: Counter[bytes] = Counter()
    for reading in tiers.values():
        for tenant in reading.tenants:
            chunks[tenant.tenant] += tenant.chunks
            used[tenant.tenant] += tenant.used_bytes
    table = Table("tenant", "chunks", "used", box=None, pad_edge=False)
    for name, count in used.most_common():
        table.add_row(name.hex() or "-", str(chunks[name]), size(count))
    return table


def chunks_table(chunks: Chunks) -> Table:
    table = Table(*CHUNK_COLUMNS, box=None, pad_edge=False)
    for store, theirs in chunks.items():
        for chunk in theirs:
            seen = "tail" if chunk.tail else "often" if chunk.hot else "once"
            sizes = (size(chunk.size), size(chunk.raw_size), str(chunk.quality_layers), str(chunk.leases))
            owner = (chunk.tenant.hex()[:SHORT] or "-", chunk.fingerprint[:SHORT])
            table.add_row(chunk.key.hex(), store, _tier(chunk.tier), *sizes, seen, *owner)
    return table


def stat_json(tiers: Tiers) -> str:
    return json.dumps({store: _fields(reading) for store, reading in tiers.items()})


def chunks_json(chunks: Chunks) -> str:
    return json.dumps([{"store": store, **_fields(chunk)} for store, theirs in chunks.items() for chunk in theirs])


def verify_json(results: Mapping[str, tuple[int, Sequence[bytes]]]) -> str:
    """Of each store, how many were verified and which were damaged."""
    return json.dumps(
        {store: {"verified": count, "damaged": [key.hex() for key in keys]} for store, (count, keys) in results.items()}
    )


def evict_json(results: Mapping[str, pb.EvictChunksResponse]) -> str:
    return json.dumps({store: _fields(result) for store, result in results.items()})


def _fields(message: Message) -> dict[str, Any]:
    """A message's fields: bytes as hexadecimal digits, enums and 64-bit numbers as people write them."""
    return {field.name: _value(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_single(field, each) for each in value]
    return _single(field, value)


def _single(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return _fields(value)
    if isinstance(value, bytes):
        return value.hex()
    return _tier(value) if field.enum_type is not None else value


def _tier(value: int) -> str:
    from kvmesh.v1 import kvstore_pb2

    return kvstore_pb2.ChunkTier.Name(value).removeprefix("CHUNK_TIER_").lower()  # type: ignore[arg-type]
