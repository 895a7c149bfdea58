"""Who is alive, as kept in Redis: registrations that expire, and epochs that only grow.

Knows Redis and nothing of calls between workers. Every call is bounded by short socket timeouts; Redis being away is
`Unavailable` to a reader, and something to wait out for a registration.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from google.protobuf import json_format
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from kvmesh.background import background
from kvmesh.errors import InvalidArgument, Unavailable
from kvmesh.registry import scripts
from kvmesh.rpc.convert import worker_info_from_proto, worker_info_to_proto
from kvmesh.types import WorkerInfo
from kvmesh.v1 import common_pb2 as pb

logger = logging.getLogger(__name__)

SOCKET_TIMEOUT = 1.0
MAX_ENTRY_BYTES = 64 << 10
FIRST_RETRY = 0.1
_AWAY = (RedisError, OSError, asyncio.TimeoutError)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Workers by id. `generation` changes when Redis has lost what it held."""

    generation: str
    workers: tuple[WorkerInfo, ...]


class Registration:
    """A worker's entry, kept alive while `Registry.register` is open."""

    def __init__(self, info: WorkerInfo, superseded: asyncio.Event | None = None) -> None:
        self.info = info
        self.payload = encode(info)
        self.registered = asyncio.Event()
        """Redis holds the entry, as of the last heartbeat."""
        self.superseded = superseded or asyncio.Event()
        """A process of the same worker_id and a higher epoch has taken over; this one no longer registers."""


class Registry:
    """`ttl`: seconds after which a silent worker is gone. Raises InvalidArgument if the url is none."""

    def __init__(self, url: str, ttl: float = 5.0) -> None:
        self.ttl = ttl
        self.malformed = 0
        """Entries skipped so far because they could not be read."""
        self.redis = connect(url)
        self._last_epoch = 0
        self._next_epoch = self.redis.register_script(scripts.NEXT_EPOCH)
        self._beat = self.redis.register_script(scripts.BEAT)
        self._leave = self.redis.register_script(scripts.LEAVE)
        self._list = self.redis.register_script(scripts.LIST)

    async def next_epoch(self, worker_id: str) -> int:
        """Greater than every epoch that this worker_id had: the time in ms, or one more than the last. Never fails."""
        now = max(time.time_ns() // 1_000_000, self._last_epoch + 1)
        self._last_epoch = now
        with suppress(*_AWAY):
            given = await self._next_epoch(keys=[scripts.EPOCH + worker_id], args=[now, scripts.EPOCH_TTL_MS])
            self._last_epoch = int(given)
        return self._last_epoch

    @asynccontextmanager
    async def register(self, info: WorkerInfo, superseded: asyncio.Event | None = None) -> AsyncIterator[Registration]:
        """Registers and beats every ttl / 3 until the block is left, then deregisters. Redis may come and go.

        `superseded` is set once a younger process has the name.
        """
        registration = Registration(info, superseded)
        await self._try_beat(registration)
        try:
            async with background(self._keep_beating(registration), f"heartbeat of {info.worker_id}"):
                yield registration
        finally:
            await self._deregister(registration)

    async def list(self) -> list[WorkerInfo]:
        """Who is registered, by worker_id.

        Raises:
            Unavailable: Redis is away.
        """
        return [*(await self.snapshot()).workers]

    async def snapshot(self) -> Snapshot:
        """As list(), with the generation; one round trip. Malformed entries are skipped and counted.

        Raises:
            Unavailable: Redis is away.
        """
        try:
            generation, *entries = await self._list(
                keys=[scripts.WORKERS, scripts.GENERATION], args=[scripts.WORKER, secrets.token_hex(8)]
            )
        except _AWAY as error:
            raise Unavailable(f"the registry cannot be reached: {error}") from error
        return Snapshot(generation.decode(), self._decode_all(entries))

    async def close(self) -> None:
        await self.redis.aclose()

    def _decode_all(self, entries: Sequence[bytes]) -> tuple[WorkerInfo, ...]:
        decoded = [decode(entry) for entry in entries]
        self.malformed += decoded.count(None)
        return tuple(sorted((info for info in decoded if info), key=lambda info: info.worker_id))

    async def _keep_beating(self, registration: Registration) -> None:
        interval = self.ttl / 3
        retry = FIRST_RETRY
        while not registration.superseded.is_set():
            await asyncio.sleep(interval if registration.registered.is_set() else min(retry, interval))
            good = await self._try_beat(registration)
            retry = FIRST_RETRY if good else min(2 * retry, interval)

    async def _try_beat(self, registration: Registration) -> bool:
        info = registration.info
        try:
            mine = await self._beat(
                keys=[scripts.WORKER + info.worker_id, scripts.WORKERS],
                args=[info.worker_id, registration.payload, info.epoch, round(self.ttl * 1000)],
            )
        except _AWAY as error:
            if registration.registered.is_set():
                logger.warning("%s cannot reach the registry and goes on without it: %s", info.worker_id, error)
            registration.registered.clear()
            return False
        self._note(registration, bool(mine))
        return True

    def _note(self, registration: Registration, mine: bool) -> None:
        if mine:
            registration.registered.set()
            return
        logger.error("a younger process has taken the name %s", registration.info.worker_id)
        registration.registered.clear()
        registration.superseded.set()

    async def _deregister(self, registration: Registration) -> None:
        """The entry expires by itself if Redis is away."""
        worker_id = registration.info.worker_id
        with suppress(*_AWAY):
            await self._leave(
                keys=[scripts.WORKER + worker_id, scripts.WORKERS], args=[worker_id, registration.payload]
            )


def connect(url: str) -> Redis:
    """A client that gives up after SOCKET_TIMEOUT, having tried a second time at once: an idle connection may be dead.

    Raises:
        InvalidArgument: not a redis://, rediss:// or unix:// URL.
    """
    try:
        return Redis.from_url(
            url,
            socket_timeout=SOCKET_TIMEOUT,
            socket_connect_timeout=SOCKET_TIMEOUT,
            retry=Retry(NoBackoff(), 1),
        )
    except ValueError as error:
        raise InvalidArgument(f"not the URL of a Redis server: {url!r} ({error})") from error


def encode(info: WorkerInfo) -> bytes:
    """JSON, with the field names of `common.proto`."""
    message = worker_info_to_proto(info)
    return json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None).encode()


def decode(entry: bytes) -> WorkerInfo | None:
    """None if it is not a WorkerInfo; fields of later versions are ignored."""
    if len(entry) > MAX_ENTRY_BYTES:
        return None
    try:
        return worker_info_from_proto(json_format.Parse(entry, pb.WorkerInfo(), ignore_unknown_fields=True))
    except (json_format.ParseError, InvalidArgument, ValueError, RecursionError):
        return None
