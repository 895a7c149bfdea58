"""The remote tier: bitstreams in Redis or Valkey, single or as a cluster, for chunks that the other tiers let go.

Content-addressed and shared: what one store put there, any store finds. Entirely expendable: every call has a short
time limit, a tier that fails is left alone for RETRY_SECONDS, and what cannot be had is a counted error and a miss.

Keys are spread over BUCKETS, each with a hash tag of its own, so that one script touches one slot of a cluster::

    kvmesh:{blobs:7}:blob:KEY   label and bitstream; expires when it has not been read for `ttl`
    kvmesh:{blobs:7}:uses       sorted set of keys by the time of last use, in ms
    kvmesh:{blobs:7}:sizes      hash of bytes and tenant by key
    kvmesh:{blobs:7}:used       the sum of the bytes
    kvmesh:{blobs:7}:tenants    the same of each tenant

A blob is written before these name it, and each bucket evicts within its share of the budget and of each tenant's
quota (`ledger`). Cold chunks are taken only where there is room: one that was seen once drives nothing out. Knows no
lease.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from redis.exceptions import RedisClusterException, RedisError

from kvmesh.types import TierCounts
from kvmesh_kvstore.chunks import Entry, Offer
from kvmesh_kvstore.label import label_bytes, pack, unpack
from kvmesh_kvstore.ledger import FORGET, REFERENCE

BUCKETS = 16
RETRY_SECONDS = 2.0
MAX_QUEUED_BYTES = 64 << 20
_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class RemoteCounters(TierCounts):
    """Since the start, of this process alone. `refused`: chunks for which there was no room; `dropped`: chunks that
    came faster than they could be written."""

    refused: int = 0
    dropped: int = 0


class RemoteTier:
    """`redis`: a client of redis-py, asyncio, single or cluster, that decodes nothing. Times in seconds.

    `budget` and `quota`, that of each tenant (None: no limit), in bytes, for all stores together.
    """

    def __init__(
        self, redis: Any, budget: int, *, quota: int | None = None, ttl: float = 86_400.0, timeout: float = 0.5
    ) -> None:
        self._redis, self._timeout = redis, timeout
        self.budget, self._quota = budget, budget if quota is None else min(quota, budget)
        self._ttl_ms = int(ttl * 1000)
        self.counters = RemoteCounters()
        self._away_until = 0.0
        self._queue: deque[tuple[Offer, bytes, bool]] = deque()
        self._queued = 0
        self._news = asyncio.Event()

    # Coming

    def wants(self, entry: Entry) -> bool:
        """Is a chunk worth the way? A tail is nobody else's."""
        return entry.owner is None and self._present and entry.size <= self._quota // BUCKETS

    def offer(self, offer: Offer, bitstream: bytes, hot: bool) -> None:
        """To be written by `run`; dropped if too much is waiting already."""
        if self._queued + len(bitstream) > MAX_QUEUED_BYTES:
            self.counters.dropped += 1
            return
        self._queue.append((offer, bitstream, hot))
        self._queued += len(bitstream)
        self._news.set()

    async def run(self) -> None:
        """Writes until cancelled."""
        while True:
            while self._queue:
                offer, bitstream, hot = self._queue.popleft()
                self._queued -= len(bitstream)
                await self._ask(lambda: self.put(offer, bitstream, hot), None)  # noqa: B023
            self._news.clear()
            await self._news.wait()

    async def put(self, offer: Offer, bitstream: bytes, hot: bool) -> None:
        """Raises RedisError, OSError."""
        keys, blob = _keys(offer.key), pack(offer) + bitstream
        await self._redis.set(keys[0], blob, px=self._ttl_ms)
        limits = (len(blob), _now_ms(), self._ttl_ms, self.budget // BUCKETS, int(hot))
        owner = (keys[0][: -len(offer.key)], offer.tenant.hex(), self._quota // BUCKETS)
        taken, evicted = await self._redis.eval(REFERENCE, len(keys), *keys, offer.key, *limits, *owner)
        self.counters.admissions += taken
        self.counters.evictions += evicted
        self.counters.refused += not taken

    async def save(self, entries: Iterable[Entry], fetch: Callable[[Entry], Awaitable[bytes | None]]) -> None:
        """What is wanted of these chunks, now: their store is about to leave."""
        for entry in entries:
            if entry.hot and self.wants(entry) and (bitstream := await fetch(entry)) is not None:
                await self._ask(lambda: self.put(entry.offer, bitstream, hot=True), None)  # noqa: B023

    # Reading

    async def find(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that are there now."""

        async def ask() -> set[bytes]:
            async with self._redis.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.exists(_keys(key)[0])
                found = await pipe.execute()
            return {key for key, here in zip(keys, found, strict=True) if here}

        return await self._ask(ask, set())

    async def get(self, key: bytes) -> tuple[Offer, bytes] | None:
        """What is there under a key, not verified yet; None is a miss."""

        async def ask() -> bytes | None:
            blob, uses, *_ = _keys(key)
            content: bytes | None = await self._redis.getex(blob, px=self._ttl_ms)
            if content is not None:
                await self._redis.zadd(uses, {key: _now_ms()}, xx=True)
            return content

        if (content := await self._ask(ask, None)) is None:
            self.counters.misses += 1
            return None
        if (offer := unpack(content)) is None:
            await self.reject(key)
            return None
        self.counters.found(offer.size)
        return offer, content[label_bytes(offer) :]

    async def reject(self, key: bytes) -> None:
        """What is there is damaged, and goes."""
        self.counters.errors += 1
        await self.delete(key)

    async def delete(self, key: bytes) -> bool:
        """Was it there?"""
        return bool(await self._ask(lambda: self._redis.eval(FORGET, len(_keys(key)), *_keys(key), key), 0))

    # For operators

    async def usage(self) -> tuple[int, int]:
        """(chunks, bytes) of all stores together; zeros if it is away."""

        async def ask() -> tuple[int, int]:
            async with self._redis.pipeline(transaction=False) as pipe:
                for uses, _, used, _ in map(_names, range(BUCKETS)):
                    pipe.zcard(uses)
                    pipe.get(used)
                answers = await pipe.execute()
            return sum(answers[::2]), sum(int(used or 0) for used in answers[1::2])

        return await self._ask(ask, (0, 0))

    async def clear(self) -> int:
        """Drops everything; how many chunks that was."""
        dropped = 0
        for bucket in range(BUCKETS):
            uses = _names(bucket)[0]
            keys: list[bytes] = await self._ask(lambda: self._redis.zrange(uses, 0, -1), [])  # noqa: B023
            dropped += sum([await self.delete(key) for key in keys])
        return dropped

    async def close(self) -> None:
        await self._redis.aclose()

    @property
    def _present(self) -> bool:
        return time.monotonic() >= self._away_until

    async def _ask(self, call: Callable[[], Awaitable[T]], otherwise: T) -> T:
        """In the time there is, or `otherwise`, which is counted; nothing is asked of a tier that was just away."""
        if not self._present:
            self.counters.errors += 1
            return otherwise
        try:
            async with asyncio.timeout(self._timeout):
                return await call()
        except _FAILURES as error:
            log.warning("the remote tier fails and is left alone for %s s: %s", RETRY_SECONDS, error or "too slow")
            self._away_until = time.monotonic() + RETRY_SECONDS
            self.counters.errors += 1
            return otherwise


def connect(url: str, timeout: float = 0.5) -> Any:
    """A client for redis://…, rediss://… or, of a cluster, redis+cluster://… and rediss+cluster://….

    Raises:
        ValueError: it is none of these.
    """
    from redis.asyncio import Redis
    from redis.asyncio.cluster import RedisCluster

    limits: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    scheme, cluster, rest = url.partition("+cluster")
    return RedisCluster.from_url(scheme + rest, **limits) if cluster else Redis.from_url(url, **limits)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _names(bucket: int) -> tuple[bytes, bytes, bytes, bytes]:
    root = f"kvmesh:{{blobs:{bucket}}}:".encode()
    return root + b"uses", root + b"sizes", root + b"used", root + b"tenants"


def _keys(key: bytes) -> tuple[bytes, ...]:
    bucket = key[0] % BUCKETS
    return f"kvmesh:{{blobs:{bucket}}}:blob:".encode() + key, *_names(bucket)
