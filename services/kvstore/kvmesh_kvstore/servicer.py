"""Proto <-> domain for KvStoreService and ChunkSourceService; decides nothing.

A peer that stops reading or writing in the middle of a stream is given STALL_SECONDS, then the stream ends: a frozen
process must not hold chunks in memory for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, TypeVar

import grpc.aio

from kvmesh.errors import DeadlineExceeded, InvalidArgument
from kvmesh.kv import bitstream
from kvmesh.kv.codec import CODECS
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc as grpc_pb
from kvmesh_kvstore.admin import TIER
from kvmesh_kvstore.chunks import Entry, Offer
from kvmesh_kvstore.events import EventType
from kvmesh_kvstore.incoming import MAX_FRAME_BYTES, MAX_KEYS, MAX_NAME_CHARACTERS, check_key
from kvmesh_kvstore.leases import MAX_TTL
from kvmesh_kvstore.reception import Allowance, Reception
from kvmesh_kvstore.vault import PutStatus, Vault

STALL_SECONDS = 30.0
T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

_STATUS = MappingProxyType(
    {
        PutStatus.OK: pb.CHUNK_STATUS_OK,
        PutStatus.EXISTS: pb.CHUNK_STATUS_EXISTS,
        PutStatus.CORRUPT: pb.CHUNK_STATUS_CORRUPT,
        PutStatus.FULL: pb.CHUNK_STATUS_FULL,
    }
)
_EVENT = MappingProxyType(
    {
        EventType.STORED: pb.CHUNK_EVENT_TYPE_STORED,
        EventType.EVICTED: pb.CHUNK_EVENT_TYPE_EVICTED,
        EventType.RESET: pb.CHUNK_EVENT_TYPE_RESET,
    }
)


class KvStoreServicer(grpc_pb.KvStoreServiceServicer, grpc_pb.ChunkSourceServiceServicer):
    """Implements `kvmesh.v1.KvStoreService` and `kvmesh.v1.ChunkSourceService`."""

    def __init__(self, vault: Vault, epoch: int, allowance: Allowance, stall_seconds: float = STALL_SECONDS) -> None:
        self._vault, self._epoch, self._allowance, self._stall = vault, epoch, allowance, stall_seconds

    async def FindMissingChunks(
        self, request: pb.FindMissingChunksRequest, context: Context
    ) -> pb.FindMissingChunksResponse:
        _check_keys(request.keys)
        lease_id = request.lease_id if request.HasField("lease_id") else None
        missing = await self._vault.find_missing(request.keys, lease_id)
        return pb.FindMissingChunksResponse(missing_keys=missing)

    async def StatChunks(self, request: pb.StatChunksRequest, context: Context) -> pb.StatChunksResponse:
        _check_keys(request.keys)
        return pb.StatChunksResponse(chunks=[_stat(key, self._vault.store.peek(key)) for key in request.keys])

    async def PutChunks(self, requests: AsyncIterator[pb.PutChunksRequest], context: Context) -> pb.PutChunksResponse:
        reception: Reception | None = None
        try:
            async for request in _unstalled(requests, self._stall):
                reception = reception or Reception(self._vault, self._allowance, _lease_of(request))
                if request.WhichOneof("part") == "header":
                    reception.header(_offer(request.header))
                else:
                    await reception.data(request.data)
            if reception:
                reception.end()
            results = reception.results if reception else []
            return pb.PutChunksResponse(results=[pb.PutChunkResult(key=key, status=_STATUS[s]) for key, s in results])
        finally:
            if reception:
                reception.close()

    async def GetChunks(self, request: pb.GetChunksRequest, context: Context) -> None:  # type: ignore[override]
        _check_keys(request.keys)
        for key in request.keys:
            if (chunk := await self._vault.read(key)) is None:
                missing = pb.GetChunkHeader(key=key, status=pb.CHUNK_STATUS_MISSING)
                await self._send(context, pb.GetChunksResponse(header=missing))
                continue
            traits, bitstream = chunk
            end = traits.end(request.quality_layers)
            header = pb.GetChunkHeader(
                key=key, status=pb.CHUNK_STATUS_OK, size=end, layer_ends=traits.layer_ends, codec_id=traits.codec
            )
            await self._send(context, pb.GetChunksResponse(header=header))
            for start in range(0, end, MAX_FRAME_BYTES):
                part = bitstream[start : min(start + MAX_FRAME_BYTES, end)]
                await self._send(context, pb.GetChunksResponse(data=part))

    async def AcquireLease(self, request: pb.AcquireLeaseRequest, context: Context) -> pb.AcquireLeaseResponse:
        _check_lease(request.lease_id, request.ttl_ms)
        self._vault.sweep()
        granted = self._vault.store.leases.acquire(request.lease_id, request.ttl_ms / 1000, self._vault.now)
        return pb.AcquireLeaseResponse(ttl_ms=int(granted * 1000))

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> pb.RenewLeaseResponse:
        _check_lease(request.lease_id, request.ttl_ms)
        granted = self._vault.store.leases.renew(request.lease_id, request.ttl_ms / 1000, self._vault.now)
        return pb.RenewLeaseResponse(ttl_ms=int(granted * 1000))

    async def ReleaseLease(self, request: pb.ReleaseLeaseRequest, context: Context) -> pb.ReleaseLeaseResponse:
        _check_lease(request.lease_id)
        return pb.ReleaseLeaseResponse(released=self._vault.release(request.lease_id))

    async def WatchEvents(
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.WatchEventsResponse]:
        log = self._vault.events
        after = request.after_sequence or log.last
        await context.send_initial_metadata(())  # tells the caller that nothing escapes it from now on
        async with aclosing(log.watch(after)) as events:
            async for event in events:
                yield pb.WatchEventsResponse(
                    sequence=event.sequence,
                    epoch=self._epoch,
                    type=_EVENT[event.type],
                    key=event.key,
                    size=event.size,
                )

    async def GetCapabilities(self, request: pb.GetCapabilitiesRequest, context: Context) -> pb.GetCapabilitiesResponse:
        return pb.GetCapabilitiesResponse(
            max_keys=MAX_KEYS,
            max_frame_bytes=MAX_FRAME_BYTES,
            max_chunk_bytes=bitstream.MAX_BITSTREAM_BYTES,
            max_lease_ttl_ms=int(MAX_TTL * 1000),
            bitstream_version=bitstream.VERSION,
            codec_ids=sorted(CODECS),
        )

    async def _send(self, context: Context, message: pb.GetChunksResponse) -> None:
        try:
            async with asyncio.timeout(self._stall):
                await context.write(message)
        except TimeoutError:
            raise DeadlineExceeded(f"nothing was read for {self._stall} s") from None


async def _unstalled(
    requests: AsyncIterator[pb.PutChunksRequest], seconds: float
) -> AsyncIterator[pb.PutChunksRequest]:
    while True:
        try:
            async with asyncio.timeout(seconds):
                request = await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceeded(f"nothing was sent for {seconds} s") from None
        if request is None:
            return
        yield request


def _offer(header: pb.PutChunkHeader) -> Offer:
    return Offer(header.key, header.fingerprint, header.size, header.parent_key, header.tail, header.tenant)


def _stat(key: bytes, entry: Entry | None) -> pb.ChunkStat:
    if entry is None:
        return pb.ChunkStat(key=key)
    traits = entry.traits
    return pb.ChunkStat(
        key=key,
        present=True,
        size=entry.size,
        layer_ends=traits.layer_ends,
        codec_id=traits.codec,
        tier=TIER[entry.tier],
        leases=len(entry.pins),
    )


def _lease_of(request: pb.PutChunksRequest) -> str | None:
    return request.lease_id if request.HasField("lease_id") else None


def _check_keys(keys: Sequence[bytes]) -> None:
    if len(keys) > MAX_KEYS:
        raise InvalidArgument(violations=[("keys", f"must be at most {MAX_KEYS}")])
    for i, key in enumerate(keys):
        check_key(f"keys[{i}]", key)


def _check_lease(lease_id: str, ttl_ms: int = 1) -> None:
    named, lasting = 0 < len(lease_id) <= MAX_NAME_CHARACTERS, ttl_ms > 0
    violations = [("lease_id", f"must have 1 to {MAX_NAME_CHARACTERS} characters")] if not named else []
    violations += [("ttl_ms", "must be greater than 0")] if not lasting else []
    if violations:
        raise InvalidArgument(violations=violations)
