"""One request as a worker understands it, and why a worker would not take it.

Pure: knows no proto, no engine state and no store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvmesh.engine.api import EngineRequest, Sample
from kvmesh.errors import InvalidArgument, Mismatch
from kvmesh.grammar import problem as grammar_problem
from kvmesh.kv.codec import Codec, Raw
from kvmesh.kv.keys import namespace_root
from kvmesh.types import ChunkRef, KvTicket, Readers, SamplingParams, WorkerCapacity, WorkerInfo


@dataclass(frozen=True, slots=True)
class Speed:
    """What a prompt of `tokens` took to compute, and its KV to encode and to decode, in one thread, in each codec."""

    tokens: int
    compute_seconds: float
    coding: tuple[Coding, ...] = ()


@dataclass(frozen=True, slots=True)
class Coding:
    """A bitstream that was made and read."""

    bits: bytes = field(repr=False)
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Model:
    """What a worker serves; `layout` is what the fingerprint is made of, `codec` what its chunks are encoded with."""

    name: str
    fingerprint: str
    layout: Mapping[str, str]
    vocabulary_size: int
    capacity: WorkerCapacity
    codec: Codec = field(default_factory=Raw)
    speed: Speed | None = None
    """What was measured on the way up."""
    structured_output: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt to compute or to continue."""

    request_id: str
    model: str
    fingerprint: str
    prompt: tuple[int, ...]
    samples: tuple[Sample, ...]
    sampling: SamplingParams
    ticket: KvTicket | None = None
    cache_salt: str = ""
    readers: Readers = field(default_factory=Readers)
    """Of what is published."""
    ttft_budget: float | None = None
    """Seconds that are left until the first token is due."""

    @property
    def chunks(self) -> tuple[ChunkRef, ...]:
        return self.ticket.chunks if self.ticket else ()

    @property
    def loadable_tokens(self) -> int:
        """Prompt tokens whose KV may come from elsewhere: all but the last, if a sample draws from its logits."""
        return len(self.prompt) - any(not sample.tokens for sample in self.samples)

    def engine_request(self, *, load_kv: bool, prefill_only: bool = False) -> EngineRequest:
        root = namespace_root(self.fingerprint, self.cache_salt)
        return EngineRequest(
            self.request_id, self.prompt, self.sampling, self.samples, load_kv, prefill_only, root
        )  # fmt: skip


def check(job: Job, model: Model, peers: Iterable[WorkerInfo] = ()) -> None:
    """Refuses what this worker cannot compute.

    `peers`: who is known in the mesh, to say in which fields the layout of a fingerprint differs.

    Raises:
        Mismatch: another model or another layout.
        InvalidArgument: every value out of range, named.
    """
    _check_pairing(job, model, peers)
    violations = [*_problems(job, model), *job.sampling.problems(model.vocabulary_size)]
    if grammar := job.sampling.grammar:
        text = grammar_problem(grammar) if model.structured_output else f"is not to be had of the model {model.name}"
        violations += [(grammar.kind, text)] if text else []
    if violations:
        raise InvalidArgument(violations=violations)


def matches(job: Job, model: Model) -> bool:
    """True if job and worker are of one model and one layout."""
    fingerprints = {job.fingerprint} | ({job.ticket.fingerprint} if job.chunks and job.ticket else set())
    layers = {(chunk.first_layer, chunk.end_layer) for chunk in job.chunks}
    capacity = model.capacity
    return (
        job.model == model.name
        and fingerprints == {model.fingerprint}
        and layers <= {(capacity.first_layer, capacity.end_layer)}
    )


def _check_pairing(job: Job, model: Model, peers: Iterable[WorkerInfo]) -> None:
    if matches(job, model):
        return
    if job.model != model.name:
        raise Mismatch(f"this worker serves model {model.name!r}, not {job.model!r}")
    for fingerprint in (job.fingerprint, job.ticket.fingerprint if job.ticket else job.fingerprint):
        if fingerprint != model.fingerprint:
            layout = next((peer.layout for peer in peers if peer.fingerprint == fingerprint), None)
            raise Mismatch(f"KV of layout {fingerprint[:12]} does not fit this worker: {_difference(layout, model)}")
    own = f"[{model.capacity.first_layer}, {model.capacity.end_layer})"
    raise Mismatch(f"the ticket's chunks are not of this worker's layers {own}")


def _difference(layout: Mapping[str, str] | None, model: Model) -> str:
    if layout is None:
        return f"its own is {model.fingerprint[:12]}, and no known worker has the other"
    names = sorted(name for name in {*layout, *model.layout} if layout.get(name) != model.layout.get(name))
    return ", ".join(f"{name} is {layout.get(name)!r} there, {model.layout.get(name)!r} here" for name in names)


def _problems(job: Job, model: Model) -> list[tuple[str, str]]:
    tokens = [*job.prompt, *(token for sample in job.samples for token in sample.tokens)]
    indices = [sample.index for sample in job.samples]
    checks = [
        ("request_id", bool(job.request_id), "must not be empty"),
        ("prompt_token_ids", bool(job.prompt), "must not be empty"),
        ("prompt_token_ids", all(0 <= token < model.vocabulary_size for token in tokens), "must be of the vocabulary"),
        ("prompt_token_ids", len(job.prompt) < model.capacity.max_model_len,
         f"must be fewer than the context of {model.capacity.max_model_len} tokens"),
        ("samples", bool(job.samples), "must not be empty"),
        ("samples", len(set(indices)) == len(indices) and all(0 <= i < job.sampling.n for i in indices),
         "must have distinct indices below n"),
        ("samples", all(len(sample.tokens) < job.sampling.max_tokens for sample in job.samples),
         "must have tokens left to generate"),
        ("ticket", _contiguous(job), "must name chunks of the prompt in order, without gaps"),
    ]  # fmt: skip
    return [(name, text) for name, good, text in checks if not good]


def _contiguous(job: Job) -> bool:
    end = 0
    for chunk in job.chunks:
        if chunk.start != end or chunk.tokens < 1 or len(chunk.key) != 32:
            return False
        end = chunk.end
    sources = len(job.ticket.sources) if job.ticket else 0
    return end <= len(job.prompt) and all(0 <= chunk.source < sources for chunk in job.chunks)
