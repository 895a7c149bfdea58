"""Proto -> domain for what prefill and decode requests have in common."""

from __future__ import annotations

from collections.abc import Callable

from kvmesh.engine.api import Sample
from kvmesh.rpc.convert import sampling_from_proto, ticket_from_proto
from kvmesh.types import SamplingParams
from kvmesh.v1 import decode_pb2, prefill_pb2
from kvmesh.worker.job import Job


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
    )
