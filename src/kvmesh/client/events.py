"""What a client receives: frozen values, and how they are read from the wire.

Pure: no channel, no asyncio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from kvmesh.rpc.convert import (
    finish_reason_from_proto,
    logprobs_from_proto,
    statistics_from_proto,
    worker_info_from_proto,
)
from kvmesh.types import FinishReason, PositionLogprobs, WorkerInfo, WorkerStatistics
from kvmesh.v1 import router_pb2

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """First event of a stream. `seed` repeats the request; `token_ids` only if asked for."""

    request_id: str
    model: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What sample `index` gained; `token_offset` is its output position afterwards and only grows."""

    index: int
    token_offset: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """How sample `index` ended, and with which stop string or token if one did it."""

    index: int
    reason: FinishReason | None
    completion_tokens: int
    stop: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as in `common.proto`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    transferred_tokens: int = 0
    recomputed_tokens: int = 0
    fetched_bytes: int = 0
    chunks_by_quality: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds per hop, as in `common.proto`; zero: did not happen."""

    queue_seconds: float = 0.0
    prefill_queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    publish_seconds: float = 0.0
    decode_queue_seconds: float = 0.0
    transfer_seconds: float = 0.0
    first_token_seconds: float = 0.0
    per_token_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Finish:
    """Last event of a stream."""

    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    recoveries: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""


Event = PromptInfo | Delta | Finish


@dataclass(frozen=True, slots=True)
class Completion:
    """A generation in one piece; `outputs` has one whole-text delta per sample, by index."""

    prompt: PromptInfo
    outputs: tuple[Delta, ...]
    finish: Finish

    @property
    def text(self) -> str:
        """The text of the first sample."""
        return self.outputs[0].text if self.outputs else ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the mesh serves, as in `router.proto`."""

    name: str
    max_model_len: int = 0
    vocabulary_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    has_chat_template: bool = False
    fingerprint: str = ""
    prefill_workers: int = 0
    decode_workers: int = 0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One process of the mesh; `statistics` is None when it did not answer, and `error` says why."""

    info: WorkerInfo
    statistics: WorkerStatistics | None
    error: str = ""


T = TypeVar("T", bound="DataclassInstance")


def _read(kind: type[T], message: Any) -> T:
    """A dataclass from the message with the same field names."""
    values = {field.name: getattr(message, field.name) for field in fields(kind)}
    return kind(**{name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else tuple(value)


def event_from_proto(message: router_pb2.GenerateStreamResponse) -> Event | None:
    """The event of a stream message; None for a kind newer than this client."""
    match message.WhichOneof("event"):
        case "prompt":
            return _read(PromptInfo, message.prompt)
        case "delta":
            return delta_from_proto(message.delta)
        case "finish":
            return finish_from_proto(message.finish)
    return None


def delta_from_proto(message: router_pb2.Delta) -> Delta:
    logprobs = tuple(map(logprobs_from_proto, message.logprobs))
    return Delta(message.index, message.token_offset, message.text, tuple(message.token_ids), logprobs)


def finish_from_proto(message: router_pb2.FinishInfo) -> Finish:
    return Finish(
        tuple(map(_choice, message.choices)),
        replace(_read(Usage, message.usage), chunks_by_quality=dict(message.usage.chunks_by_quality)),
        _read(Timings, message.timings),
        message.recoveries,
        message.prefill_worker,
        message.decode_worker,
    )


def completion_from_proto(message: router_pb2.GenerateResponse) -> Completion:
    outputs = (
        Delta(c.index, len(c.token_ids), c.text, tuple(c.token_ids), tuple(map(logprobs_from_proto, c.logprobs)))
        for c in message.completions
    )
    return Completion(_read(PromptInfo, message.prompt), tuple(outputs), finish_from_proto(message.finish))


def model_from_proto(message: router_pb2.ModelInfo) -> ModelInfo:
    return _read(ModelInfo, message)


def status_from_proto(message: router_pb2.WorkerStatus) -> WorkerStatus:
    statistics = statistics_from_proto(message.statistics) if message.HasField("statistics") else None
    return WorkerStatus(worker_info_from_proto(message.info), statistics, message.error)


def _choice(message: router_pb2.ChoiceFinish) -> Choice:
    return Choice(
        message.index,
        finish_reason_from_proto(message.reason),
        message.completion_tokens,
        message.stop if message.WhichOneof("matched_stop") == "stop" else None,
        message.stop_token_id if message.WhichOneof("matched_stop") == "stop_token_id" else None,
    )
