"""Proto <-> domain for DecodeService; nothing is decided here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc.aio

from kvmesh.engine.api import Sample
from kvmesh.errors import InvalidArgument
from kvmesh.rpc.convert import token_batch_to_proto
from kvmesh.rpc.deadline import deadline_of
from kvmesh.types import TokenBatch
from kvmesh.v1 import decode_pb2 as pb
from kvmesh.v1 import decode_pb2_grpc
from kvmesh.worker.convert import fetched_to_proto, job_from_proto
from kvmesh.worker.outbox import Outbox
from kvmesh.worker.worker import DEFAULT_DEADLINE, Worker
from kvmesh_decode.decode import Decode, Started

Context = grpc.aio.ServicerContext[Any, Any]


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Implements `kvmesh.v1.DecodeService`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._flow = Decode(worker)

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> None:  # type: ignore[override]
        samples = tuple(Sample(sample.index, tuple(sample.token_ids)) for sample in request.samples)
        job = job_from_proto(request, self._worker.model.capacity.max_model_len, lambda sampling: samples)
        await self._worker.check(job)

        # A message less before the first token: what was started goes with it, or with a heartbeat.
        responses = _Responses()

        async def send(message: Started | list[TokenBatch]) -> None:
            if isinstance(message, Started):
                responses.started = message
            else:
                await outbox.send(responses.make(message))

        async with Outbox(context.write, responses.make, self._worker.alive, at_once=False) as outbox:
            await self._flow.run(job, deadline_of(context, DEFAULT_DEADLINE), send)

    async def AbortDecode(self, request: pb.AbortDecodeRequest, context: Context) -> pb.AbortDecodeResponse:
        if not request.request_id:
            raise InvalidArgument(violations=[("request_id", "must not be empty")])
        return pb.AbortDecodeResponse(aborted=await self._worker.sessions.abort(request.request_id))


class _Responses:
    """`started` travels once, with the next message whatever that is."""

    def __init__(self) -> None:
        self.started: Started | None = None

    def make(self, batches: Sequence[TokenBatch] = ()) -> pb.DecodeResponse:
        """A message with these tokens; without any, a heartbeat."""
        started, self.started = self.started, None
        samples = [token_batch_to_proto(batch) for batch in batches]
        return pb.DecodeResponse(samples=samples, started=_started(started) if started else None)


def _started(started: Started) -> pb.DecodeStarted:
    return pb.DecodeStarted(
        queue_seconds=started.queue_seconds,
        transfer_seconds=started.transfer_seconds,
        local_tokens=started.local_tokens,
        fetched_tokens=started.fetched_tokens,
        recomputed_tokens=started.recomputed_tokens,
        recompute_reason=started.reason,
        fetched=fetched_to_proto(started.imported),
    )
