"""What a client asks of the router and what it is told, as domain values.

Knows no proto and no worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.scheduling.policy import Slo
from kvmesh.types import FinishReason, PositionLogprobs, SamplingParams


@dataclass(frozen=True, slots=True)
class ChatInput:
    messages: tuple[Mapping[str, str], ...]
    add_generation_prompt: bool = True


PromptInput = str | ChatInput | tuple[int, ...] | None
"""Text, chat messages, token ids, or nothing (which is a violation)."""


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    text: bool = True
    include_special_tokens: bool = False
    prompt_token_ids: bool = False


@dataclass(frozen=True, slots=True)
class BestOfOptions:
    """How many samples were asked for, and whether with log-probabilities."""

    keep: int
    logprobs: bool


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request asks for, in seconds; None: what the router is set to."""

    ttft: float | None = None
    tpot: float | None = None

    def over(self, usual: Slo) -> Slo:
        return Slo(self.ttft or usual.ttft, self.tpot or usual.tpot)


@dataclass(frozen=True, slots=True)
class Request:
    """A valid request: what flow.py serves."""

    request_id: str
    model: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    response: ResponseOptions = ResponseOptions()
    cache_salt: str = ""
    best_of: BestOfOptions | None = None
    """Of `sampling.n` samples give out the likeliest; None: all."""
    objectives: Objectives = Objectives()


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """First event."""

    request_id: str
    model: str
    prompt_tokens: int
    seed: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What a sample gained; `token_offset` is the output position after it."""

    index: int
    token_offset: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """How a sample ended."""

    index: int
    reason: FinishReason
    completion_tokens: int
    stop: str | None = None
    stop_token_id: int | None = None


@dataclass(slots=True)
class Timings:
    """Seconds; fields as in `common.proto`."""

    queue_seconds: float = 0.0
    prefill_queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    publish_seconds: float = 0.0
    decode_queue_seconds: float = 0.0
    transfer_seconds: float = 0.0
    first_token_seconds: float = 0.0
    per_token_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(slots=True)
class Usage:
    """Tokens; fields as in `common.proto`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    transferred_tokens: int = 0
    recomputed_tokens: int = 0
    fetched_bytes: int = 0
    chunks_by_quality: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Finish:
    """Last event."""

    choices: list[Choice] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    recoveries: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""


Event = PromptInfo | Delta | Finish
