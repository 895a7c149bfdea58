"""Proto <-> domain for StoreAdminService: what operators see of a store and do to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from types import MappingProxyType
from typing import Any

import grpc.aio

from kvmesh.errors import InvalidArgument
from kvmesh.types import TENANT_BYTES, TierCounts
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as grpc_pb
from kvmesh_kvstore.chunks import Entry, Tier
from kvmesh_kvstore.incoming import MAX_KEYS, MAX_NAME_CHARACTERS, check_key
from kvmesh_kvstore.remote import RemoteTier
from kvmesh_kvstore.shelves import Shelf
from kvmesh_kvstore.vault import Vault

MAX_TENANTS = 256
PAGE = 256
"""Chunks in a message."""
Context = grpc.aio.ServicerContext[Any, Any]
Matches = Callable[[Entry], bool]

TIER = MappingProxyType(
    {
        Tier.MEMORY: pb.CHUNK_TIER_MEMORY,
        Tier.DISK: pb.CHUNK_TIER_DISK,
        Tier.REMOTE: pb.CHUNK_TIER_REMOTE,
    }
)


class StoreAdminServicer(grpc_pb.StoreAdminServiceServicer):
    """Implements `kvmesh.v1.StoreAdminService`."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    async def GetTiers(self, request: pb.GetTiersRequest, context: Context) -> pb.GetTiersResponse:
        store = self._vault.store
        counters, accounts = store.counters, sorted(store.accounts, key=lambda each: each[1].used, reverse=True)
        tiers = [_tier(shelf) for shelf in store.shelves if shelf.budget]
        tiers += [await _remote_tier(self._vault.remote)] if self._vault.remote else []
        return pb.GetTiersResponse(
            tiers=tiers,
            tenants=[
                pb.TenantReading(tenant=tenant, chunks=len(account.entries), used_bytes=account.used)
                for tenant, account in accounts[:MAX_TENANTS]
            ],
            tenant_quota_bytes=store.accounts.quota or 0,
            hits=counters.hits,
            misses=counters.misses,
            damaged=counters.damaged,
            raw_bytes=store.raw_bytes,
            chunks_by_quality=store.qualities,
        )

    async def ListChunks(self, request: pb.ListChunksRequest, context: Context) -> AsyncIterator[pb.ListChunksResponse]:
        found = self._chosen(request.filter)[: request.limit or None]
        for page in _pages(found):
            yield pb.ListChunksResponse(chunks=[_described(entry) for entry in page])

    async def VerifyChunks(
        self, request: pb.VerifyChunksRequest, context: Context
    ) -> AsyncIterator[pb.VerifyChunksResponse]:
        chosen = self._chosen(request.filter)
        yield pb.VerifyChunksResponse(total=len(chosen))
        for done, entry in enumerate(chosen, start=1):
            here = entry in self._vault.store
            bad = here and await self._vault.verified(entry) is None and entry not in self._vault.store
            damaged = [entry.key] if bad else []
            yield pb.VerifyChunksResponse(verified=done, total=len(chosen), damaged_keys=damaged)

    async def EvictChunks(self, request: pb.EvictChunksRequest, context: Context) -> pb.EvictChunksResponse:
        if not request.all and not request.filter.ByteSize():
            raise InvalidArgument(violations=[("filter", "must not be empty unless `all` is set")])
        result = pb.EvictChunksResponse()
        left = self._chosen(request.filter)
        # Continuations free their prefixes, so as long as some go others may follow.
        while gone := [entry for entry in left if await self._vault.evict(entry)]:
            result.evicted += len(gone)
            result.evicted_bytes += sum(entry.size for entry in gone)
            left = [entry for entry in left if entry in self._vault.store]
        result.kept_keys.extend(entry.key for entry in left)
        result.evicted += await self._evict_afar(request)
        return result

    async def _evict_afar(self, request: pb.EvictChunksRequest) -> int:
        """The remote tier knows keys alone: it drops those named, or everything."""
        remote = self._vault.remote
        if remote is None:
            return 0
        if not request.filter.ByteSize():
            return await remote.clear()
        return sum([await remote.delete(key) for key in request.filter.keys])

    def _chosen(self, filter: pb.ChunkFilter) -> list[Entry]:
        """The longest unused first. Raises InvalidArgument."""
        matches = _matcher(filter)
        return [entry for shelf in self._vault.store.shelves for entry in shelf if matches(entry)]


def _matcher(filter: pb.ChunkFilter) -> Matches:
    _check(filter)
    keys, tenant = set(filter.keys), filter.tenant if filter.HasField("tenant") else None

    def matches(entry: Entry) -> bool:
        return (
            (not keys or entry.key in keys)
            and entry.key.hex().startswith(filter.key_prefix.lower())
            and entry.offer.fingerprint.startswith(filter.fingerprint_prefix)
            and tenant in (None, entry.offer.tenant)
        )

    return matches


def _check(filter: pb.ChunkFilter) -> None:
    if len(filter.keys) > MAX_KEYS:
        raise InvalidArgument(violations=[("filter.keys", f"must be at most {MAX_KEYS}")])
    for i, key in enumerate(filter.keys):
        check_key(f"filter.keys[{i}]", key)
    digits = set(filter.key_prefix.lower()) <= set("0123456789abcdef") and len(filter.key_prefix) <= 64
    checks = [
        ("filter.key_prefix", digits, "must be at most 64 hexadecimal digits"),
        ("filter.fingerprint_prefix", len(filter.fingerprint_prefix) <= MAX_NAME_CHARACTERS,
         f"must have at most {MAX_NAME_CHARACTERS} characters"),
        ("filter.tenant", len(filter.tenant) in (0, TENANT_BYTES), f"must be {TENANT_BYTES} bytes or empty"),
    ]  # fmt: skip
    if violations := [(name, text) for name, good, text in checks if not good]:
        raise InvalidArgument(violations=violations)


def _pages(entries: list[Entry]) -> Iterator[list[Entry]]:
    remaining = iter(entries)
    while page := list(islice(remaining, PAGE)):
        yield page


def _described(entry: Entry) -> pb.StoredChunk:
    offer, traits = entry.offer, entry.traits
    return pb.StoredChunk(
        key=offer.key,
        parent_key=offer.parent,
        fingerprint=offer.fingerprint,
        tenant=offer.tenant,
        size=offer.size,
        raw_size=traits.raw_bytes,
        tier=TIER[entry.tier],
        codec_id=traits.codec,
        quality_layers=len(traits.layer_ends),
        leases=len(entry.pins),
        tail=offer.tail,
        hot=entry.hot,
    )


def _tier(shelf: Shelf) -> pb.TierReading:
    return _reading(shelf.tier, shelf.budget, shelf.used, len(shelf), shelf.counters)


async def _remote_tier(remote: RemoteTier) -> pb.TierReading:
    chunks, used = await remote.usage()
    reading = _reading(Tier.REMOTE, remote.budget, used, chunks, remote.counters)
    reading.errors += remote.counters.dropped
    return reading


def _reading(tier: Tier, budget: int, used: int, chunks: int, counts: TierCounts) -> pb.TierReading:
    return pb.TierReading(
        tier=TIER[tier],
        budget_bytes=budget,
        used_bytes=used,
        chunks=chunks,
        hits=counts.hits,
        misses=counts.misses,
        read_bytes=counts.read_bytes,
        admissions=counts.admissions,
        evictions=counts.evictions,
        errors=counts.errors,
    )
