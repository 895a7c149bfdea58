"""What the router says to workers: requests as protos, stubs by address, leases released.

Knows the workers' protos and connections; decides nothing and retries nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from kvmesh.errors import KvmeshError
from kvmesh.kv.client import StoreClient
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.convert import sampling_to_proto, ticket_to_proto
from kvmesh.rpc.stream import unary
from kvmesh.types import KvTicket, Readers, WorkerInfo
from kvmesh.v1 import common_pb2, common_pb2_grpc, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from kvmesh_router.claim import Lease
from kvmesh_router.events import Request
from kvmesh_router.output import SampleOutput
from kvmesh_router.readers import ReaderLinks

ABORT_SECONDS = 2.0
DRAIN_SECONDS = 600.0


@dataclass(slots=True)
class Stubs:
    """Of one address, and the epoch of the process that was last known there."""

    epoch: int
    prefill: prefill_pb2_grpc.PrefillServiceAsyncStub
    decode: decode_pb2_grpc.DecodeServiceAsyncStub
    worker: common_pb2_grpc.WorkerServiceAsyncStub
    power: common_pb2_grpc.PowerServiceAsyncStub


class Peers:
    def __init__(self, channels: ChannelPool) -> None:
        self._channels = channels
        self._stores = StoreClient(channels)
        self._stubs: dict[str, Stubs] = {}
        self.links = ReaderLinks()

    def at(self, worker: WorkerInfo) -> Stubs:
        """The stubs of a worker; connecting is the first call's. A worker that has restarted gets a new connection."""
        stubs = self._stubs.get(worker.address)
        if stubs is not None and worker.epoch > stubs.epoch:
            self._channels.discard(worker.address)
            stubs = None
        if stubs is None:
            channel = self._channels.get(worker.address)
            stubs = self._stubs[worker.address] = Stubs(
                worker.epoch,
                prefill_pb2_grpc.PrefillServiceStub(channel),
                decode_pb2_grpc.DecodeServiceStub(channel),
                common_pb2_grpc.WorkerServiceStub(channel),
                common_pb2_grpc.PowerServiceStub(channel),
            )
        return stubs

    def retain(self, workers: Iterable[WorkerInfo]) -> None:
        """Closes the connections to all others; one that has left the registry to drain ends its calls first."""
        workers = list(workers)
        self.links.retain(workers)
        for address in self._stubs.keys() - {worker.address for worker in workers}:
            del self._stubs[address]
            self._channels.discard(address, DRAIN_SECONDS)

    async def release(self, lease: Lease) -> None:
        """Ends a lease, and the prefill under it if it still runs. Never fails: what cannot be told expires."""
        if lease.prefill is not None and await self._abort_prefill(lease.prefill, lease):
            return
        await self._stores.release(lease.ticket)

    async def statistics(
        self, worker: WorkerInfo, check_integrity: bool, timeout: float
    ) -> common_pb2.WorkerStatistics | str:
        """The worker's own reading, or why there is none."""
        request = common_pb2.GetStatisticsRequest(check_integrity=check_integrity)
        try:
            response = await unary(self.at(worker).worker.GetStatistics(request, timeout=timeout))
        except KvmeshError as error:
            return str(error)
        return response.statistics

    async def cap_clock(self, worker: WorkerInfo, share: float, seconds: float, timeout: float) -> str:
        """Of the worker's accelerators, for so many seconds; why it could not be done, or nothing."""
        request = common_pb2.CapClockRequest(clock=share, lease_seconds=seconds)
        try:
            await unary(self.at(worker).power.CapClock(request, timeout=timeout))
        except KvmeshError as error:
            return str(error)
        return ""

    async def _abort_prefill(self, worker: WorkerInfo, lease: Lease) -> bool:
        request = prefill_pb2.AbortPrefillRequest(request_id=lease.request_id, ticket=ticket_to_proto(lease.ticket))
        try:
            async with asyncio.timeout(ABORT_SECONDS):
                await unary(self.at(worker).prefill.AbortPrefill(request, timeout=ABORT_SECONDS))
        except (KvmeshError, TimeoutError):
            return False
        return True


def prefill_request(
    request: Request,
    request_id: str,
    fingerprint: str,
    ticket: KvTicket,
    readers: Readers | None = None,
    budget: float | None = None,
) -> prefill_pb2.PrefillRequest:
    """`request_id` names this attempt; `budget`: seconds until the first token is due."""
    sampling, stopping = sampling_to_proto(request.sampling)
    return prefill_pb2.PrefillRequest(
        request_id=request_id,
        model=request.model,
        fingerprint=fingerprint,
        prompt_token_ids=request.prompt,
        sampling=sampling,
        stopping=stopping,
        logprobs=request.sampling.logprobs,
        ticket=ticket_to_proto(ticket),
        eos_token_ids=sorted(request.sampling.eos_token_ids),
        cache_salt=request.cache_salt,
        readers=common_pb2.Readers(**asdict(readers or Readers())),
        ttft_budget_seconds=budget,
    )


def decode_request(
    request: Request,
    request_id: str,
    fingerprint: str,
    ticket: KvTicket | None,
    unfinished: Iterable[SampleOutput],
    budget: float | None = None,
) -> decode_pb2.DecodeRequest:
    """Continues the unfinished samples from the tokens that they have."""
    sampling, stopping = sampling_to_proto(request.sampling)
    return decode_pb2.DecodeRequest(
        request_id=request_id,
        model=request.model,
        fingerprint=fingerprint,
        prompt_token_ids=request.prompt,
        samples=[decode_pb2.DecodeSample(index=s.index, token_ids=s.tokens) for s in unfinished],
        sampling=sampling,
        stopping=stopping,
        logprobs=request.sampling.logprobs,
        ticket=None if ticket is None else ticket_to_proto(ticket),
        eos_token_ids=sorted(request.sampling.eos_token_ids),
        cache_salt=request.cache_salt,
        ttft_budget_seconds=budget,
    )
