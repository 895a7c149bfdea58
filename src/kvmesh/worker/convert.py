"""Proto <-> domain for what prefill and decode have in common."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

from kvmesh.engine.api import Sample
from kvmesh.rpc.convert import sampling_from_proto, ticket_from_proto
from kvmesh.types import Readers, SamplingParams
from kvmesh.v1 import common_pb2, decode_pb2, prefill_pb2
from kvmesh.worker.job import Job
from kvmesh.worker.transfer import Imported


def job_from_proto(
    request: prefill_pb2.PrefillRequest | decode_pb2.DecodeRequest,
    context_tokens: int,
    samples: Callable[[SamplingParams], tuple[Sample, ...]],
) -> Job:
    """`context_tokens`: of this worker, the default bound of the output. `samples`: those to compute."""
    logprobs = request.logprobs if request.HasField("logprobs") else None
    left = max(1, context_tokens - len(request.prompt_token_ids))
    sampling = sampling_from_proto(request.sampling, request.stopping, logprobs, request.eos_token_ids, left)
    return Job(
        request.request_id,
        request.model,
        request.fingerprint,
        tuple(request.prompt_token_ids),
        samples(sampling),
        sampling,
        ticket_from_proto(request.ticket) if request.HasField("ticket") else None,
        request.cache_salt,
        readers_of(request),
        budget_of(request),
    )


def readers_of(request: prefill_pb2.PrefillRequest | decode_pb2.DecodeRequest) -> Readers:
    """Who reads what is published; nobody does of a decode."""
    if isinstance(request, decode_pb2.DecodeRequest):
        return Readers()
    rate = request.readers.bytes_per_second
    return Readers(request.readers.remote, rate if isfinite(rate) and rate > 0 else 0.0)


def budget_of(request: prefill_pb2.PrefillRequest | decode_pb2.DecodeRequest) -> float | None:
    """Seconds, not below 0; None without a limit."""
    if not request.HasField("ttft_budget_seconds") or not isfinite(request.ttft_budget_seconds):
        return None
    return max(0.0, request.ttft_budget_seconds)


def fetched_to_proto(imported: Imported) -> common_pb2.KvFetched:
    return common_pb2.KvFetched(
        bytes=imported.bytes,
        chunks_by_quality=imported.qualities,
        link_bytes_per_second=imported.throughput,
    )
