"""What a client sends: keyword options to a request message.

Pure. Checks only what the wire cannot carry (types and signs); ranges are the router's to judge, so that every caller
hears the same words.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from google.protobuf.message import Message as ProtoMessage

from kvmesh.errors import InvalidArgument
from kvmesh.v1 import common_pb2, router_pb2


class Message(TypedDict):
    """A turn of a chat."""

    role: str
    content: str


class Options(TypedDict, total=False):
    """Options of one generation; absent means the router's default. Meanings and ranges are in `common.proto`."""

    model: str
    request_id: str
    cache_salt: str
    low_priority: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    json_schema: str
    regex: str
    lark: str
    best_of: int
    beam_width: int
    length_penalty: float
    early_stopping: bool
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    text: bool
    include_special_tokens: bool
    prompt_token_ids: bool


PARTS: dict[str, type[ProtoMessage]] = {
    "sampling": common_pb2.SamplingParameters,
    "stopping": common_pb2.StoppingParameters,
    "response": router_pb2.ResponseOptions,
}
R = TypeVar("R", router_pb2.GenerateRequest, router_pb2.GenerateStreamRequest)


def build_request(
    kind: type[R],
    prompt: str | None,
    chat: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    options: Options,
) -> R:
    """A request of `kind`; a request id is chosen if none is given, so that it can be aborted at any time.

    Raises:
        InvalidArgument: not exactly one kind of input, or values that the wire cannot carry, all named.
    """
    if sum(given is not None for given in (prompt, chat, token_ids)) != 1:
        raise InvalidArgument("give exactly one of a prompt, chat messages or token ids")
    violations: list[tuple[str, str]] = []
    request = kind(request_id=uuid.uuid4().hex)
    for name, value in options.items():
        _assign(_part_of(request, name), name, value, violations)
    _set_input(request, prompt, chat, token_ids, violations)
    if violations:
        raise InvalidArgument(violations=violations)
    return request


def _part_of(request: ProtoMessage, name: str) -> ProtoMessage:
    parts = [part for part, kind in PARTS.items() if name in kind.DESCRIPTOR.fields_by_name]
    # ResponseOptions.text and the input `text` share a name; as an option it means the former.
    if parts:
        return getattr(request, parts[0])  # type: ignore[no-any-return]
    if name in request.DESCRIPTOR.fields_by_name:
        return request
    raise InvalidArgument(f"{name!r} is not an option of a generation")


def _assign(message: ProtoMessage, name: str, value: Any, violations: list[tuple[str, str]]) -> None:
    try:
        match value:
            case str() | int() | float():
                setattr(message, name, value)
            case Mapping():
                getattr(message, name).update(value)
            case Iterable():
                getattr(message, name).extend(value)
            case _:
                raise TypeError(f"{type(value).__name__} is not accepted")
    except (TypeError, ValueError, AttributeError, OverflowError):
        violations.append((name, f"cannot be {value!r}"))


def _set_input(
    request: router_pb2.GenerateRequest | router_pb2.GenerateStreamRequest,
    prompt: str | None,
    chat: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    violations: list[tuple[str, str]],
) -> None:
    if prompt is not None:
        _assign(request, "text", prompt, violations)
    elif chat is not None:
        # An empty list still has to say which kind of input it is.
        request.chat.SetInParent()
        request.chat.messages.extend(router_pb2.ChatMessage(**message) for message in chat)
    else:
        request.token_ids.SetInParent()
        _assign(request.token_ids, "ids", token_ids, violations)
