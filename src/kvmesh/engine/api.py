"""What an engine takes and gives: the contract between `kvmesh.worker` and whatever computes.

Torch-free, synchronous. One engine is owned by one thread; nothing here is safe to call from another.

The life of a request::

    add() ──> waiting ──(blocks reserved)──> Admitted ─┬─(load_kv false)──────────────> running ──> TokenOutput(finish)
                                                       └─(load_kv true) import_kv()* start() ─┘

A preempted sequence goes back to waiting and is recomputed; nobody outside notices but by the time it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kvmesh.types import FinishReason, PositionLogprobs, SamplingParams, WorkerStatistics

KvArray = np.ndarray[Any, np.dtype[Any]]
"""KV of consecutive tokens in the canonical layout `[layers, planes (K, V), tokens, kv_heads, head_dim]`."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The shape of a token's KV. `planes`: 2, or 1 where values are read out of the keys (latent attention)."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    """numpy name: float32, float16, or bfloat16 (exchanged as uint16 bit patterns)."""
    planes: int = 2

    @property
    def wire_dtype(self) -> np.dtype[Any]:
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.planes * self.kv_heads * self.head_dim * self.wire_dtype.itemsize

    def chunk_shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        return (self.layers, self.planes, tokens, self.kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a request; `tokens` are the output tokens that it already has (a resumed request)."""

    index: int
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A unit of work.

    `load_kv`: after Admitted, wait for import_kv()/start() instead of computing at once.
    `prefill_only`: end each sample after its first token with finish_reason None unless that token ends it anyway.
    `root`: start of the block hash chain (namespace and tenant salt); only requests of equal root share blocks.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    samples: tuple[Sample, ...] = (Sample(0),)
    load_kv: bool = False
    prefill_only: bool = False
    root: bytes = b""


@dataclass(frozen=True, slots=True)
class Admitted:
    """Blocks for the whole prompt are reserved; the KV of the first `cached_tokens` is already in the pool."""

    request_id: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Computing:
    """The first forward pass that includes the request begins."""

    request_id: str


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One token of one sample. `offset`: its output position. `last`: the engine is done with the sample."""

    request_id: str
    index: int
    offset: int
    token_id: int
    logprobs: PositionLogprobs | None = None
    finish_reason: FinishReason | None = None
    matched_stop_token: int | None = None
    last: bool = False


@dataclass(frozen=True, slots=True)
class KvReady:
    """KV of prompt tokens [start, start + data.shape[2]) is final; `copy` is a private copy, or gets it."""

    request_id: str
    start: int
    copy: KvArray | Callable[[], KvArray] = field(repr=False)

    @property
    def data(self) -> KvArray:
        """The copy, in any thread; waits for it where it is still on its way from a device."""
        return self.copy() if callable(self.copy) else self.copy


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine cannot go on with the request; it holds nothing for it any more."""

    request_id: str
    error: Exception


Event = Admitted | Computing | TokenOutput | KvReady | Failed


class Engine(Protocol):
    """See the module docstring for the order of calls."""

    @property
    def layout(self) -> KvLayout: ...

    def add(self, request: EngineRequest) -> None:
        """Queues a request.

        Raises:
            AlreadyExists: the id is in use.
            InvalidArgument: empty prompt, or prompt and outputs beyond the context.
            Overloaded: too many waiting requests, or it could never fit the pool.
        """

    def import_kv(self, request_id: str, start: int, data: KvArray) -> None:
        """Writes KV of prompt tokens [start, start + data.shape[2]); parts already in the pool are left alone.

        A request that is gone is ignored: the import lost a race with an abort.

        Raises:
            InvalidArgument: shape or dtype is not the layout's, or the range is beyond the prompt.
        """

    def start(self, request_id: str, computed_tokens: int, exports: Collection[tuple[int, int]] = ()) -> None:
        """Lets an admitted request run. Its first `computed_tokens` prompt tokens are in the pool.

        `exports`: (start, end) token ranges to hand out as KvReady when final, ascending and disjoint.
        A request that is gone is ignored.
        """

    def abort(self, request_id: str) -> bool:
        """Forgets a request and frees its blocks; False if there is none. Idempotent, no event follows."""

    def step(self) -> Sequence[Event]:
        """Admits, schedules, computes one iteration; returns what happened. Never raises for one request's fault."""

    def has_work(self) -> bool:
        """True if step() would do something now."""

    def statistics(self) -> WorkerStatistics:
        """Load and pool counters."""

    def check_integrity(self) -> list[str]:
        """What is wrong with the pool; empty is good."""
