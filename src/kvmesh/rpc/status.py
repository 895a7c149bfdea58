"""`KvmeshError` <-> gRPC status with `google.rpc` details: the only translator, in both directions.

Knows the table of `kvmesh.errors` and the detail messages BadRequest, RetryInfo and ErrorInfo; no call, no context.
Everything is clipped to what fits the trailing metadata (grpc refuses more than about 8 KiB).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvmesh.errors import STATUS_TO_ERROR, InvalidArgument, KvmeshError, Overloaded, Unavailable

DOMAIN = "kvmesh"
_MESSAGE_BYTES = 1024
_VIOLATIONS = 16
_FIELD_BYTES = 64
_DESCRIPTION_BYTES = 160


def to_status(error: KvmeshError) -> grpc.Status:
    """What `context.abort_with_status` takes."""
    proto = status_pb2.Status(code=error.code.value[0], message=_clip(str(error), _MESSAGE_BYTES))
    proto.details.extend(_packed(detail) for detail in _details(error))
    status: grpc.Status = rpc_status.to_status(proto)
    return status


def from_rpc_error(error: grpc.aio.AioRpcError) -> KvmeshError:
    """The error that the peer raised, as far as its status tells.

    A call that the peer cancelled is Unavailable: it is going away, another may serve. Codes outside the table become
    a plain KvmeshError.
    """
    code = error.code()
    if code is grpc.StatusCode.CANCELLED:
        return Unavailable(error.details() or "the peer cancelled the call")
    message = error.details() or code.name
    kind: Callable[..., KvmeshError] = STATUS_TO_ERROR.get(code, KvmeshError)
    if kind is InvalidArgument:
        return InvalidArgument(message, _violations(error))
    return Overloaded(message, _retry_after(error)) if kind is Overloaded else kind(message)


def _details(error: KvmeshError) -> Iterator[Message]:
    yield error_details_pb2.ErrorInfo(reason=_reason(error), domain=DOMAIN)
    if isinstance(error, InvalidArgument) and error.violations:
        yield error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=_clip(name, _FIELD_BYTES), description=_clip(text, _DESCRIPTION_BYTES)
                )
                for name, text in error.violations[:_VIOLATIONS]
            ]
        )
    if isinstance(error, Overloaded) and error.retry_after > 0:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(round(error.retry_after * 1e9))
        yield info


def _reason(error: KvmeshError) -> str:
    """DeadlineExceeded -> DEADLINE_EXCEEDED, as google.rpc wants it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).upper()


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _clip(text: str, limit: int) -> str:
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= limit else raw[: limit - 3].decode("utf-8", "ignore") + "…"


def _violations(error: grpc.aio.AioRpcError) -> list[tuple[str, str]]:
    bad = error_details_pb2.BadRequest()
    return [(v.field, v.description) for v in bad.field_violations] if _unpack(error, bad) else []


def _retry_after(error: grpc.aio.AioRpcError) -> float:
    """0 if the peer did not say: a message too large is not accepted later either."""
    info = error_details_pb2.RetryInfo()
    return max(0.0, info.retry_delay.ToNanoseconds() / 1e9) if _unpack(error, info) else 0.0


def _unpack(error: grpc.aio.AioRpcError, detail: Message) -> bool:
    try:
        status = rpc_status.from_call(error)
        return status is not None and any(packed.Unpack(detail) for packed in status.details)
    except (ValueError, DecodeError):  # A peer's malformed details: the code and the message still hold.
        return False
