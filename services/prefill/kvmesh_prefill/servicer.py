"""Proto <-> domain for PrefillService; nothing is decided here."""

from __future__ import annotations

from typing import Any

import grpc.aio

from kvmesh.engine.api import Sample
from kvmesh.errors import InvalidArgument
from kvmesh.rpc.convert import ticket_from_proto, token_batch_to_proto
from kvmesh.rpc.deadline import deadline_of
from kvmesh.types import SamplingParams
from kvmesh.v1 import prefill_pb2 as pb
from kvmesh.v1 import prefill_pb2_grpc
from kvmesh.worker.convert import fetched_to_proto, job_from_proto
from kvmesh.worker.outbox import Outbox
from kvmesh.worker.worker import DEFAULT_DEADLINE, Worker
from kvmesh_prefill.prefill import FirstTokens, Prefill, Published

Context = grpc.aio.ServicerContext[Any, Any]


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Implements `kvmesh.v1.PrefillService`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._flow = Prefill(worker)

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> None:  # type: ignore[override]
        job = job_from_proto(request, self._worker.model.capacity.max_model_len, _fresh)
        await self._worker.check(job)

        async def send(tokens: FirstTokens) -> None:
            await outbox.send(pb.PrefillResponse(first_tokens=_first_tokens(tokens)))

        async with Outbox(context.write, _progress, self._worker.alive) as outbox:
            published = await self._flow.run(job, deadline_of(context, DEFAULT_DEADLINE), send)
            await outbox.send(pb.PrefillResponse(published=_published(published)))

    async def AbortPrefill(self, request: pb.AbortPrefillRequest, context: Context) -> pb.AbortPrefillResponse:
        if not request.request_id:
            raise InvalidArgument(violations=[("request_id", "must not be empty")])
        aborted = await self._worker.sessions.abort(request.request_id)
        if request.HasField("ticket"):
            await self._worker.store.release(ticket_from_proto(request.ticket))
        return pb.AbortPrefillResponse(aborted=aborted)


def _fresh(sampling: SamplingParams) -> tuple[Sample, ...]:
    return tuple(Sample(index) for index in range(sampling.n))


def _progress() -> pb.PrefillResponse:
    return pb.PrefillResponse(progress=pb.PrefillProgress())


def _first_tokens(tokens: FirstTokens) -> pb.PrefillFirstTokens:
    return pb.PrefillFirstTokens(
        samples=[token_batch_to_proto(batch) for batch in tokens.samples],
        queue_seconds=tokens.queue_seconds,
        compute_seconds=tokens.compute_seconds,
        local_tokens=tokens.local_tokens,
        stored_tokens=tokens.stored_tokens,
        fetched=fetched_to_proto(tokens.imported),
    )


def _published(published: Published) -> pb.PrefillPublished:
    return pb.PrefillPublished(chunks=published.chunks, publish_seconds=published.seconds, reason=published.reason)
