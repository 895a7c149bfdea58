"""The vocabulary of the domain: frozen values that every room may use.

Knows no proto, no asyncio, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

BLOCK_TOKENS = 16
"""Tokens in a block of paged KV."""
CHUNK_TOKENS = 256
"""Tokens in a chunk: the unit of hashing, storage and transfer (16 blocks)."""
TENANT_BYTES = 16
"""Of the name that a store knows a tenant by."""
MAX_LOGPROBS = 20
MAX_SAMPLES = 64
MAX_STOP_STRINGS = 16
MAX_BEAMS = 32


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


class Role(StrEnum):
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    KVSTORE = "kvstore"
    MIXED = "mixed"
    """Prefill and decode in one process."""

    @property
    def prefills(self) -> bool:
        return self in (Role.PREFILL, Role.MIXED)

    @property
    def decodes(self) -> bool:
        return self in (Role.DECODE, Role.MIXED)


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a sample's text must match, from its first character to its last."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sample ends; fields as in `protos/kvmesh/v1/common.proto`.

    Stop strings are text and so the router's: the engine knows token ids only.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    best_of: int = 0
    """Samples of which the `n` likeliest are kept; 0: all `n`."""
    beam_width: int = 0
    """Beams of a beam search, whose `n` best hypotheses are the samples; 0: tokens are drawn."""
    length_penalty: float = 1.0
    early_stopping: bool = False

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """Tokens that end a sample, once `min_tokens` have been generated."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | self.eos_token_ids

    def problems(self, vocabulary_size: int) -> list[tuple[str, str]]:
        """Every value out of range, as (field, what is wrong)."""
        unit = "must be in [0, 1]"
        checks = [
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("temperature", _within(self.temperature, 0, math.inf), "must be a finite number >= 0"),
            ("top_p", _within(self.top_p, 0, 1) and self.top_p > 0, "must be in (0, 1]"),
            ("top_k", self.top_k >= 0, "must be >= 0"),
            ("min_p", _within(self.min_p, 0, 1), unit),
            ("repetition_penalty", _within(self.repetition_penalty, 0, math.inf) and self.repetition_penalty > 0,
             "must be a finite number > 0"),
            ("presence_penalty", _within(self.presence_penalty, -2, 2), "must be in [-2, 2]"),
            ("frequency_penalty", _within(self.frequency_penalty, -2, 2), "must be in [-2, 2]"),
            ("n", 1 <= self.n <= MAX_SAMPLES, f"must be in [1, {MAX_SAMPLES}]"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
             f"must be in [0, {MAX_LOGPROBS}]"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "must be in [0, max_tokens]"),
            ("logit_bias", all(0 <= t < vocabulary_size and _within(b, -100, 100) for t, b in self.logit_bias.items()),
             "must map token ids of the vocabulary to values in [-100, 100]"),
            ("stop_token_ids", all(0 <= t < vocabulary_size for t in self.stop_token_ids),
             "must be token ids of the vocabulary"),
            ("best_of", not self.best_of or self.n <= self.best_of <= MAX_SAMPLES, f"must be in [n, {MAX_SAMPLES}]"),
            ("beam_width", not self.beam_width or max(2, self.n) <= self.beam_width <= MAX_BEAMS,
             f"must be at least 2, at least n, and at most {MAX_BEAMS}"),
            ("beam_width", not (self.beam_width and self.best_of), "cannot be combined with best_of"),
            ("length_penalty", _within(self.length_penalty, -10, 10), "must be in [-10, 10]"),
            (self.grammar.kind if self.grammar else "", not self.grammar or not (self.ignore_eos or self.min_tokens),
             "cannot be combined with ignore_eos or min_tokens: the grammar says where the text ends"),
        ]  # fmt: skip
        return [(name, text) for name, good, text in checks if not good]


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Natural logs, after penalties and bias, before temperature and truncation."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Consecutive tokens of one sample; `offset` is the output position of the first."""

    index: int
    offset: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop_token: int | None = None


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """A chunk of a prompt's KV: tokens [start, start + tokens) of layers [first_layer, end_layer)."""

    key: bytes
    start: int
    tokens: int
    first_layer: int
    end_layer: int
    source: int = 0
    """Index into the ticket's sources."""

    @property
    def tail(self) -> bool:
        return self.tokens < CHUNK_TOKENS

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True, slots=True)
class ChunkSource:
    worker_id: str
    address: str


@dataclass(frozen=True, slots=True)
class KvTicket:
    """The claim check for a prompt's KV: ordered chunks, who holds them, and under which lease."""

    fingerprint: str
    lease_id: str
    lease_ttl_ms: int
    chunks: tuple[ChunkRef, ...] = ()
    sources: tuple[ChunkSource, ...] = ()
    replicas: int = 1
    """Sources that are to hold each chunk."""
    tenant: bytes = b""
    """Whose the chunks are: `kvmesh.kv.keys.tenant_of` the salt."""


@dataclass(frozen=True, slots=True)
class Readers:
    """Over which links KV will be read; `bytes_per_second`: of the slowest one measured, 0 if none was."""

    remote: bool = False
    bytes_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    blocks: int = 0
    block_tokens: int = BLOCK_TOKENS
    max_running: int = 0
    max_model_len: int = 0
    first_layer: int = 0
    end_layer: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a process advertises. Two registrations are the same process iff worker_id and epoch are equal."""

    worker_id: str
    epoch: int
    role: Role
    address: str
    pid: int
    model: str = ""
    fingerprint: str = ""
    layout: Mapping[str, str] = field(default_factory=dict)
    capacity: WorkerCapacity = WorkerCapacity()
    started_at: float = 0.0
    version: str = ""


@dataclass(slots=True)
class TierCounts:
    """Of one tier of a store, since the start. `hits` and `misses`: reads that found their chunk here, or looked for it
    here in vain; `read_bytes`: of the hits. `evictions`: chunks that left for good to make room."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    admissions: int = 0
    evictions: int = 0
    errors: int = 0

    def found(self, size: int) -> None:
        self.hits += 1
        self.read_bytes += size


@dataclass(slots=True)
class WorkerStatistics:
    """A reading of one process; units as in `common.proto`."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    leases: int = 0
    chunks: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    requests_total: int = 0
    tokens_total: int = 0
    hits_total: int = 0
    misses_total: int = 0
    preemptions_total: int = 0
    uptime_seconds: float = 0.0
    draining: bool = False
    integrity_errors: list[str] = field(default_factory=list)
    raw_bytes: int = 0
    chunks_by_quality: dict[str, int] = field(default_factory=dict)
    fetched_bytes_total: int = 0
    fetched_raw_bytes_total: int = 0
    published_bytes_total: int = 0
    published_raw_bytes_total: int = 0
    missed_chunks_total: int = 0
    recomputed_tokens_total: int = 0
    missed_replicas_total: int = 0
    tiers: dict[str, TierCounts] = field(default_factory=dict)
    power_watts: float = 0.0
    energy_joules_total: float = 0.0
    power_domain: str = ""
