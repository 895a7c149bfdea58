"""Proto <-> domain for the messages of `common.proto` that several services share.

What comes off the wire is checked here as far as types go (an enum value that is not known, a field that must be
set); ranges are the business of `kvmesh.types`.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmesh.errors import InvalidArgument
from kvmesh.types import (
    TENANT_BYTES,
    ChunkRef,
    ChunkSource,
    FinishReason,
    Grammar,
    GrammarKind,
    KvTicket,
    PositionLogprobs,
    Role,
    SamplingParams,
    TierCounts,
    TokenBatch,
    TokenLogprob,
    WorkerCapacity,
    WorkerInfo,
    WorkerStatistics,
)
from kvmesh.v1 import common_pb2 as pb

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: pb.FINISH_REASON_ABORTED,
}
_FINISH_BACK = {value: reason for reason, value in _FINISH.items()}
_ROLE = {
    Role.ROUTER: pb.WORKER_ROLE_ROUTER,
    Role.PREFILL: pb.WORKER_ROLE_PREFILL,
    Role.DECODE: pb.WORKER_ROLE_DECODE,
    Role.KVSTORE: pb.WORKER_ROLE_KVSTORE,
    Role.MIXED: pb.WORKER_ROLE_MIXED,
}
_ROLE_BACK = {value: role for role, value in _ROLE.items()}


def finish_reason_to_proto(reason: FinishReason | None) -> pb.FinishReason.ValueType:
    return pb.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH[reason]


def finish_reason_from_proto(value: pb.FinishReason.ValueType) -> FinishReason | None:
    """None if unspecified.

    Raises:
        InvalidArgument: a value that this version does not know.
    """
    if value == pb.FINISH_REASON_UNSPECIFIED:
        return None
    reason = _FINISH_BACK.get(value)
    if reason is None:
        raise InvalidArgument(violations=[("finish_reason", f"has the unknown value {value}")])
    return reason


def ticket_to_proto(ticket: KvTicket) -> pb.KvTicket:
    return pb.KvTicket(
        fingerprint=ticket.fingerprint,
        lease_id=ticket.lease_id,
        lease_ttl_ms=ticket.lease_ttl_ms,
        chunks=map(_chunk_to_proto, ticket.chunks),
        sources=[pb.ChunkSource(worker_id=source.worker_id, address=source.address) for source in ticket.sources],
        replicas=ticket.replicas,
        tenant=ticket.tenant,
    )


def ticket_from_proto(ticket: pb.KvTicket) -> KvTicket:
    """
    Raises:
        InvalidArgument: a key that is not 32 bytes, or a chunk whose source the ticket does not name.
    """
    if any(len(chunk.key) != 32 for chunk in ticket.chunks):
        raise InvalidArgument(violations=[("ticket.chunks", "must have keys of 32 bytes")])
    if any(chunk.source >= len(ticket.sources) for chunk in ticket.chunks):
        raise InvalidArgument(violations=[("ticket.chunks", "must come from sources of the ticket")])
    if len(ticket.tenant) not in (0, TENANT_BYTES):
        raise InvalidArgument(violations=[("ticket.tenant", f"must have {TENANT_BYTES} bytes or none")])
    return KvTicket(
        fingerprint=ticket.fingerprint,
        lease_id=ticket.lease_id,
        lease_ttl_ms=ticket.lease_ttl_ms,
        chunks=tuple(map(_chunk_from_proto, ticket.chunks)),
        sources=tuple(ChunkSource(source.worker_id, source.address) for source in ticket.sources),
        replicas=max(1, ticket.replicas),
        tenant=ticket.tenant,
    )


def _chunk_to_proto(chunk: ChunkRef) -> pb.ChunkRef:
    return pb.ChunkRef(
        key=chunk.key,
        start=chunk.start,
        tokens=chunk.tokens,
        first_layer=chunk.first_layer,
        end_layer=chunk.end_layer,
        source=chunk.source,
    )


def _chunk_from_proto(chunk: pb.ChunkRef) -> ChunkRef:
    return ChunkRef(chunk.key, chunk.start, chunk.tokens, chunk.first_layer, chunk.end_layer, chunk.source)


def sampling_to_proto(params: SamplingParams) -> tuple[pb.SamplingParameters, pb.StoppingParameters]:
    """Every field set. `logprobs` and `eos_token_ids` have fields of their own in the requests."""
    sampling = pb.SamplingParameters(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
        n=params.n,
        best_of=params.best_of,
        beam_width=params.beam_width,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
    )
    if params.grammar:
        setattr(sampling, params.grammar.kind, params.grammar.text)
    stopping = pb.StoppingParameters(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=sorted(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
    )
    return sampling, stopping


def sampling_from_proto(
    sampling: pb.SamplingParameters,
    stopping: pb.StoppingParameters,
    logprobs: int | None,
    eos_token_ids: Iterable[int],
    default_max_tokens: int,
) -> SamplingParams:
    """Unset fields get the defaults that `common.proto` names; nothing is checked for range: see `problems()`."""

    def value(name: str, default: float) -> float:
        return getattr(sampling, name) if sampling.HasField(name) else default  # type: ignore[arg-type]

    return SamplingParams(
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else default_max_tokens,
        temperature=value("temperature", 1.0),
        top_p=value("top_p", 1.0),
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=value("repetition_penalty", 1.0),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        n=sampling.n if sampling.HasField("n") else 1,
        logprobs=logprobs,
        min_tokens=stopping.min_tokens,
        ignore_eos=stopping.ignore_eos,
        stop_token_ids=frozenset(stopping.stop_token_ids),
        eos_token_ids=frozenset(eos_token_ids),
        grammar=_grammar_from_proto(sampling),
        best_of=sampling.best_of,
        beam_width=sampling.beam_width,
        length_penalty=value("length_penalty", 1.0),
        early_stopping=sampling.early_stopping,
    )


def _grammar_from_proto(sampling: pb.SamplingParameters) -> Grammar | None:
    kind = sampling.WhichOneof("grammar")
    return Grammar(GrammarKind(kind), getattr(sampling, kind)) if kind else None


def token_batch_to_proto(batch: TokenBatch) -> pb.TokenBatch:
    return pb.TokenBatch(
        index=batch.index,
        offset=batch.offset,
        token_ids=batch.token_ids,
        logprobs=map(logprobs_to_proto, batch.logprobs),
        finish_reason=finish_reason_to_proto(batch.finish_reason),
        matched_stop_token=batch.matched_stop_token,
    )


def token_batch_from_proto(batch: pb.TokenBatch) -> TokenBatch:
    return TokenBatch(
        index=batch.index,
        offset=batch.offset,
        token_ids=tuple(batch.token_ids),
        logprobs=tuple(map(logprobs_from_proto, batch.logprobs)),
        finish_reason=finish_reason_from_proto(batch.finish_reason),
        matched_stop_token=batch.matched_stop_token if batch.HasField("matched_stop_token") else None,
    )


def logprobs_to_proto(position: PositionLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(chosen=_logprob_to_proto(position.chosen), top=map(_logprob_to_proto, position.top))


def logprobs_from_proto(position: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(_logprob_from_proto(position.chosen), tuple(map(_logprob_from_proto, position.top)))


def _logprob_to_proto(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob)


def _logprob_from_proto(token: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token.token_id, token.logprob)


def worker_info_to_proto(info: WorkerInfo) -> pb.WorkerInfo:
    capacity = info.capacity
    return pb.WorkerInfo(
        worker_id=info.worker_id,
        epoch=info.epoch,
        role=_ROLE[info.role],
        address=info.address,
        pid=info.pid,
        model=info.model,
        fingerprint=info.fingerprint,
        layout=info.layout,
        capacity=pb.WorkerCapacity(**{name: getattr(capacity, name) for name in _CAPACITY}),
        started_at_unix_seconds=info.started_at,
        version=info.version,
    )


def worker_info_from_proto(info: pb.WorkerInfo) -> WorkerInfo:
    """
    Raises:
        InvalidArgument: no worker_id, no address, or a role that this version does not know.
    """
    role = _ROLE_BACK.get(info.role)
    if role is None or not info.worker_id or not info.address:
        raise InvalidArgument(violations=[("worker_info", "must have a worker_id, an address and a known role")])
    return WorkerInfo(
        worker_id=info.worker_id,
        epoch=info.epoch,
        role=role,
        address=info.address,
        pid=info.pid,
        model=info.model,
        fingerprint=info.fingerprint,
        layout=dict(info.layout),
        capacity=WorkerCapacity(**{name: getattr(info.capacity, name) for name in _CAPACITY}),
        started_at=info.started_at_unix_seconds,
        version=info.version,
    )


def statistics_to_proto(statistics: WorkerStatistics) -> pb.WorkerStatistics:
    tiers = {name: pb.TierCounts(**{f: getattr(counts, f) for f in _TIER}) for name, counts in statistics.tiers.items()}
    others = {name: getattr(statistics, name) for name in _STATISTICS if name != "tiers"}
    return pb.WorkerStatistics(**others, tiers=tiers)


def statistics_from_proto(statistics: pb.WorkerStatistics) -> WorkerStatistics:
    scalars = {name: getattr(statistics, name) for name in _STATISTICS if name not in _STATISTICS_IN_BULK}
    return WorkerStatistics(
        **scalars,
        integrity_errors=list(statistics.integrity_errors),
        chunks_by_quality=dict(statistics.chunks_by_quality),
        tiers={name: TierCounts(**{f: getattr(counts, f) for f in _TIER}) for name, counts in statistics.tiers.items()},
    )


# Same names on both sides; the tests hold them to it.
_CAPACITY = tuple(WorkerCapacity.__dataclass_fields__)
_STATISTICS = tuple(WorkerStatistics.__dataclass_fields__)
_STATISTICS_IN_BULK = ("integrity_errors", "chunks_by_quality", "tiers")
_TIER = tuple(TierCounts.__dataclass_fields__)
