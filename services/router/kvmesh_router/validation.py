"""From what a client sent to a valid request, or to everything that is wrong with it at once.

Knows the protos of the client's contract and the model; not who will serve it.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvmesh.errors import InvalidArgument
from kvmesh.grammar import problem as grammar_problem
from kvmesh.rpc.convert import sampling_from_proto
from kvmesh.types import MAX_SAMPLES, MAX_STOP_STRINGS, SamplingParams
from kvmesh.v1 import common_pb2, router_pb2
from kvmesh_router.events import BestOfOptions, ChatInput, Objectives, PromptInput, Request, ResponseOptions
from kvmesh_router.model import Model

MAX_REQUEST_ID = 256
MAX_STOP_LENGTH = 1024
Violations = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as it came: its parts named, nothing checked but that they are there."""

    request_id: str
    model: str | None
    input: PromptInput
    sampling: common_pb2.SamplingParameters
    stopping: common_pb2.StoppingParameters
    logprobs: int | None
    response: ResponseOptions
    cache_salt: str = ""
    low_priority: bool = False
    objectives: Objectives = field(default_factory=Objectives)

    @property
    def samples(self) -> int:
        """How many were asked for, within bounds."""
        return min(max(self.sampling.n, 1), MAX_SAMPLES) if self.sampling.HasField("n") else 1


def read_submission(message: router_pb2.GenerateStreamRequest | router_pb2.GenerateRequest) -> Submission:
    """Unset fields get their defaults; a request without an id gets one."""
    response = message.response
    return Submission(
        request_id=message.request_id or uuid.uuid4().hex,
        model=message.model or None,
        input=_read_input(message),
        sampling=message.sampling,
        stopping=message.stopping,
        logprobs=response.logprobs if response.HasField("logprobs") else None,
        response=ResponseOptions(
            text=response.text if response.HasField("text") else True,
            include_special_tokens=response.include_special_tokens,
            prompt_token_ids=response.prompt_token_ids,
        ),
        cache_salt=message.cache_salt,
        low_priority=message.low_priority,
        objectives=_read_objectives(message.objectives),
    )


def _read_objectives(message: router_pb2.Objectives) -> Objectives:
    return Objectives(
        message.ttft_seconds if message.HasField("ttft_seconds") else None,
        message.tpot_seconds if message.HasField("tpot_seconds") else None,
    )


def _read_input(message: router_pb2.GenerateStreamRequest | router_pb2.GenerateRequest) -> PromptInput:
    match message.WhichOneof("input"):
        case "text":
            return message.text
        case "chat":
            chat = message.chat
            messages = tuple({"role": m.role, "content": m.content} for m in chat.messages)
            return ChatInput(messages, chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True)
        case "token_ids":
            return tuple(message.token_ids.ids)
        case _:
            return None


async def validate(submission: Submission, model: Model, context: int) -> Request:
    """The request, tokenized; `context` is how many tokens prompt and output may have together.

    Raises:
        InvalidArgument: with every violation.
    """
    prompt, violations = await _tokenize(submission, model)
    if prompt is not None:
        violations += _prompt_problems(prompt, model.vocabulary_size, context)
    left = context if prompt is None else max(1, context - len(prompt))
    sampling = sampling_from_proto(
        submission.sampling, submission.stopping, submission.logprobs, model.eos_token_ids, default_max_tokens=left
    )
    violations += sampling.problems(model.vocabulary_size)
    if prompt is not None:
        violations += _length_problems(len(prompt), sampling.max_tokens, context)
    violations += _other_problems(submission)
    if grammar := sampling.grammar:
        text = await asyncio.to_thread(grammar_problem, grammar)
        violations += [(grammar.kind, text)] if text else []
    if violations:
        raise InvalidArgument(violations=violations)
    sampling, best_of = _all_samples(_with_seed(sampling, submission.sampling.HasField("seed")))
    return Request(
        submission.request_id,
        model.name,
        tuple(prompt or ()),
        sampling,
        tuple(submission.stopping.stop),
        submission.response,
        submission.cache_salt,
        best_of,
        submission.objectives,
    )


async def _tokenize(submission: Submission, model: Model) -> tuple[Sequence[int] | None, Violations]:
    """The prompt's tokens; None if there are none to be had."""
    try:
        match submission.input:
            case None:
                return None, [("input", "must be text, chat or token_ids")]
            case str(text):
                return await model.tokenizer.encode(text), []
            case ChatInput(messages, add_generation_prompt):
                if not messages:
                    return None, [("chat", "must have a message")]
                return await model.tokenizer.encode_chat(messages, add_generation_prompt), []
            case token_ids:
                return token_ids, []
    except InvalidArgument as error:
        return None, list(error.violations)


def _prompt_problems(prompt: Sequence[int], vocabulary_size: int, context: int) -> Violations:
    if not prompt:
        return [("prompt", "must not be empty")]
    if len(prompt) >= context:
        return [("prompt", f"has {len(prompt)} tokens, which leaves no room in the context of {context}")]
    if max(prompt) >= vocabulary_size:
        return [("token_ids", f"must be below the vocabulary size of {vocabulary_size}")]
    return []


def _length_problems(prompt_tokens: int, max_tokens: int, context: int) -> Violations:
    if prompt_tokens < context < prompt_tokens + max_tokens:
        return [("max_tokens", f"goes beyond the context of {context} after {prompt_tokens} prompt tokens")]
    return []


def _other_problems(submission: Submission) -> Violations:
    stop = submission.stopping.stop
    checks = [
        ("request_id", len(submission.request_id) <= MAX_REQUEST_ID, f"must have at most {MAX_REQUEST_ID} characters"),
        ("objectives.ttft_seconds", _positive(submission.objectives.ttft), "must be > 0"),
        ("objectives.tpot_seconds", _positive(submission.objectives.tpot), "must be > 0"),
        ("stop", len(stop) <= MAX_STOP_STRINGS, f"must be at most {MAX_STOP_STRINGS} strings"),
        ("stop", all(stop), "must not contain an empty string"),
        ("stop", all(len(s) <= MAX_STOP_LENGTH for s in stop), f"must be of at most {MAX_STOP_LENGTH} characters each"),
    ]
    return [(name, text) for name, good, text in checks if not good]


def _all_samples(sampling: SamplingParams) -> tuple[SamplingParams, BestOfOptions | None]:
    """What workers draw, where `best_of` asks for more samples than are given out: ranking needs log-probabilities."""
    if sampling.best_of <= sampling.n:
        return sampling, None
    drawn = replace(sampling, n=sampling.best_of, best_of=0, logprobs=sampling.logprobs or 0)
    return drawn, BestOfOptions(sampling.n, sampling.logprobs is not None)


def _positive(seconds: float | None) -> bool:
    return seconds is None or seconds > 0


def _with_seed(sampling: SamplingParams, chosen: bool) -> SamplingParams:
    return sampling if chosen else replace(sampling, seed=secrets.randbits(32))
