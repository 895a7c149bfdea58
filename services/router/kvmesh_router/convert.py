"""Events as the client's protos. What comes in is read in `validation.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from kvmesh.rpc.convert import finish_reason_to_proto, logprobs_to_proto
from kvmesh.types import PositionLogprobs
from kvmesh.v1 import common_pb2, router_pb2
from kvmesh_router.events import Choice, Delta, Event, Finish, PromptInfo


def event_to_proto(event: Event) -> router_pb2.GenerateStreamResponse:
    match event:
        case Delta():
            return router_pb2.GenerateStreamResponse(delta=delta_to_proto(event))
        case PromptInfo():
            return router_pb2.GenerateStreamResponse(prompt=prompt_to_proto(event))
        case Finish():
            return router_pb2.GenerateStreamResponse(finish=finish_to_proto(event))


def prompt_to_proto(info: PromptInfo) -> router_pb2.PromptInfo:
    return router_pb2.PromptInfo(
        request_id=info.request_id,
        model=info.model,
        prompt_tokens=info.prompt_tokens,
        token_ids=info.token_ids,
        seed=info.seed,
    )


def delta_to_proto(delta: Delta) -> router_pb2.Delta:
    return router_pb2.Delta(
        index=delta.index,
        token_offset=delta.token_offset,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta.logprobs) if delta.logprobs else (),
    )


def finish_to_proto(finish: Finish) -> router_pb2.FinishInfo:
    return router_pb2.FinishInfo(
        choices=[_choice(choice) for choice in finish.choices],
        usage=common_pb2.Usage(**asdict(finish.usage)),
        timings=common_pb2.Timings(**asdict(finish.timings)),
        recoveries=finish.recoveries,
        prefill_worker=finish.prefill_worker,
        decode_worker=finish.decode_worker,
    )


def response_of(events: Iterable[Event]) -> router_pb2.GenerateResponse:
    """All events of a generation as one reply."""
    response = router_pb2.GenerateResponse()
    deltas: dict[int, list[Delta]] = {}
    for event in events:
        match event:
            case Delta():
                deltas.setdefault(event.index, []).append(event)
            case PromptInfo():
                response.prompt.CopyFrom(prompt_to_proto(event))
            case Finish():
                response.finish.CopyFrom(finish_to_proto(event))
    response.completions.extend(
        _completion(choice.index, deltas.get(choice.index, ())) for choice in response.finish.choices
    )
    return response


def _completion(index: int, deltas: Iterable[Delta]) -> router_pb2.Completion:
    completion = router_pb2.Completion(index=index, text="".join(delta.text for delta in deltas))
    for delta in deltas:
        completion.token_ids.extend(delta.token_ids)
        completion.logprobs.extend(_logprobs(delta.logprobs))
    return completion


def _logprobs(positions: Iterable[PositionLogprobs]) -> list[common_pb2.PositionLogprobs]:
    return [logprobs_to_proto(position) for position in positions]


def _choice(choice: Choice) -> router_pb2.ChoiceFinish:
    proto = router_pb2.ChoiceFinish(
        index=choice.index,
        reason=finish_reason_to_proto(choice.reason),
        completion_tokens=choice.completion_tokens,
    )
    if choice.stop is not None:
        proto.stop = choice.stop
    elif choice.stop_token_id is not None:
        proto.stop_token_id = choice.stop_token_id
    return proto
