"""The server's interceptor of errors: whatever a servicer raises ends the call with the status the table gives it.

It drives the handler itself, so that an async generator is closed (its `finally` blocks have run) before the call
ends, whichever way it ends. Knows `kvmesh.rpc.status`; traces are another's (`kvmesh.rpc.tracing`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio

from kvmesh.errors import InvalidArgument, KvmeshError
from kvmesh.rpc.status import to_status

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
"""None: no such method; grpc answers UNIMPLEMENTED."""
Behavior = Callable[[Any, Context], Awaitable[Any]]
"""A handler as a coroutine function, which writes its own responses if it streams."""
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """KvmeshError -> its status with details; cancellation passes; the rest -> INTERNAL, logged with its traceback."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        return rewrap(handler, lambda behavior: _guarded(behavior, method), _tolerant)


@dataclass(frozen=True, slots=True)
class Malformed:
    """In place of a request whose bytes are no message: grpc itself would answer UNKNOWN, and never ask us."""

    reason: str


Deserializer = Callable[[bytes], Any] | None
"""None leaves the bytes as they are."""


def _tolerant(deserialize: Deserializer) -> Deserializer:
    if deserialize is None:
        return None

    def tolerant(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception as error:
            return Malformed(str(error))

    return tolerant


def rewrap(
    handler: Handler,
    wrap: Callable[[Behavior], Behavior],
    reading: Callable[[Deserializer], Deserializer] = lambda deserialize: deserialize,
) -> Handler:
    """The handler with `wrap` around it; unknown methods and synchronous handlers are left alone."""
    if handler is None:
        return None
    kind = f"{_side(handler.request_streaming)}_{_side(handler.response_streaming)}"
    behavior = getattr(handler, kind)
    if not (isasyncgenfunction(behavior) or iscoroutinefunction(behavior)):
        return handler
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    rewrapped: Handler = make(
        wrap(_as_coroutine(behavior)), reading(handler.request_deserializer), handler.response_serializer
    )
    return rewrapped


def _side(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _as_coroutine(behavior: Callable[[Any, Context], Any]) -> Behavior:
    if not isasyncgenfunction(behavior):
        return behavior

    async def write_all(request: Any, context: Context) -> None:
        async with aclosing(behavior(request, context)) as responses:
            await _write(responses, context)

    return write_all


async def _write(responses: AsyncIterator[Any], context: Context) -> None:
    async for response in responses:
        await context.write(response)


def _guarded(behavior: Behavior, method: str) -> Behavior:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await behavior(_well_formed(request), context)
        except grpc.aio.AbortError:
            raise
        except KvmeshError as error:
            await context.abort_with_status(to_status(error))
        except asyncio.CancelledError:
            if _asked_to_cancel():
                raise
            # grpc would take it for the caller's and never send a status.
            await _internal(context, method)
        except Exception:
            await _internal(context, method)

    return guarded


def _well_formed(request: Any) -> Any:
    """The request, or the stream of requests.

    Raises:
        InvalidArgument: it cannot be parsed (text that is not UTF-8, say).
    """
    if isinstance(request, Malformed):
        raise InvalidArgument(f"the request is not a message of this method: {request.reason}")
    return _all_well_formed(request) if isinstance(request, AsyncIterator) else request


async def _all_well_formed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _well_formed(request)


def _asked_to_cancel() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _internal(context: Context, method: str) -> NoReturn:
    """Tells the log what happened and the caller that something did."""
    logger.exception("%s failed", method)
    await context.abort_with_status(to_status(KvmeshError(f"{method} failed; the log of the server says why")))
