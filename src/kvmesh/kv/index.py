"""Which instance stores which chunk: the index in Redis, resolved in one round trip per prefix.

One SET of keys for each instance, which expires unless the instance refreshes it: what a dead instance recorded goes
with it, and no entry dangles (LMCache#1239 has them). A hint, never the truth: a key that is found here may be gone
when asked for, and the blobs themselves never pass through Redis. Knows no tier and no ticket.

Errors of Redis leave as `redis.RedisError`, except from `match` and `locate`: a reader without an index has no hits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

_BATCH = 4096
_OWNERS = "{kvmesh:chunks}:owners"
_LOCATE = """
local found = {}
for _, owner in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local set = KEYS[1] .. ':' .. owner
  if redis.call('EXISTS', set) == 0 then
    redis.call('SREM', KEYS[1], owner)
  else
    found[#found + 1] = {owner, redis.call('SMISMEMBER', set, unpack(ARGV))}
  end
end
return found
"""


class ChunkIndex:
    """`redis` may decode responses or not; `ttl` in seconds is how long an instance that went silent is believed."""

    def __init__(self, redis: Redis, ttl: float = 15.0) -> None:
        self._redis: Any = redis  # redis-py's stubs give sync and async results as one union
        self.ttl = ttl

    async def match(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are stored by a live instance; 0 if Redis is away."""
        return sum(1 for _ in takewhile(bool, await self.locate(keys)))

    async def locate(self, keys: Sequence[bytes]) -> list[frozenset[str]]:
        """For each key (the first 4096) the worker ids of the instances that store it; none if Redis is away."""
        asked = keys[:_BATCH]
        try:
            found = await self._redis.eval(_LOCATE, 1, _OWNERS, *asked) if asked else []
        except (TimeoutError, RedisError, OSError):
            found = []
        owners = [(_text(owner), hits) for owner, hits in found]
        return [frozenset(owner for owner, hits in owners if hits[i]) for i in range(len(asked))]

    async def record(self, owner: str, keys: Collection[bytes]) -> bool:
        """The instance `owner` stores these too. Call after the blobs are whole. False: it had no entry before this."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.exists(_set_of(owner))
            self._add(pipe, owner, keys)
            return bool((await pipe.execute())[0])

    async def forget(self, owner: str, keys: Collection[bytes]) -> None:
        """The instance no longer stores these. Call before the blobs go."""
        async with self._redis.pipeline(transaction=True) as pipe:
            for batch in _batches(keys):
                pipe.srem(_set_of(owner), *batch)
            pipe.pexpire(_set_of(owner), int(self.ttl * 1000))
            await pipe.execute()

    async def replace(self, owner: str, keys: Collection[bytes]) -> None:
        """These and no others, in one transaction: at start, and after Redis was away."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(_set_of(owner))
            self._add(pipe, owner, keys)
            await pipe.execute()

    async def refresh(self, owner: str) -> bool:
        """Keeps the instance's entries for another `ttl`; False if there are none (never, or Redis lost them)."""
        return bool(await self._redis.pexpire(_set_of(owner), int(self.ttl * 1000)))

    def _add(self, pipe: Any, owner: str, keys: Collection[bytes]) -> None:
        for batch in _batches(keys):
            pipe.sadd(_set_of(owner), *batch)
        pipe.pexpire(_set_of(owner), int(self.ttl * 1000))
        pipe.sadd(_OWNERS, owner)


def _set_of(owner: str) -> str:
    return f"{_OWNERS}:{owner}"


def _batches(keys: Collection[bytes]) -> Iterator[list[bytes]]:
    listed = list(keys)
    return (listed[i : i + _BATCH] for i in range(0, len(listed), _BATCH))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
