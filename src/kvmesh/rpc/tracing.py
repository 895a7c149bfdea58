"""A span for each side of each call, joined over the wire by the W3C `traceparent` header.

Our own, and thin: the contrib instrumentation records a cancelled stream as OK and puts a layer on every message.
Here a call costs two spans and a message costs nothing. Needs OpenTelemetry; installed only where tracing is on.

A span's status is ERROR unless the call's is OK; of a cancelled call with the description "cancelled".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, cast

import grpc
import grpc.aio
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvmesh.rpc.interceptors import Behavior, Context, Continuation, Handler, rewrap

PROPAGATOR = TraceContextTextMapPropagator()
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class TracingServerInterceptor(grpc.aio.ServerInterceptor):
    """The span is current while the handler runs. Belongs outside the error interceptor, whose status it records."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        return rewrap(handler, lambda behavior: self._traced(behavior, method))

    def _traced(self, behavior: Behavior, method: str) -> Behavior:
        async def traced(request: Any, context: Context) -> Any:
            parent = PROPAGATOR.extract(_headers(context.invocation_metadata()))
            span = self._tracer.start_span(
                method[1:], parent, SpanKind.SERVER, _attributes(method, request), record_exception=False
            )
            try:
                with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                    return await behavior(request, context)
            except asyncio.CancelledError:
                _end(span, _why_cancelled(context))
                raise
            finally:
                if span.is_recording():
                    _end(span, _code(context))

        return traced


class TracingChannel(grpc.aio.Channel):
    """A channel whose calls are spans, children of the span that is current when they are made.

    The calls are grpc's own objects: a span ends with its call, not with whoever reads it.
    """

    def __init__(self, channel: grpc.aio.Channel, tracer: trace.Tracer) -> None:
        self._channel = channel
        self._tracer = tracer
        self._endings: set[asyncio.Task[None]] = set()

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        return self._traced(method, self._channel.unary_unary(method, *args, **options))

    def unary_stream(self, method: str, *args: Any, **options: Any) -> Any:
        return self._traced(method, self._channel.unary_stream(method, *args, **options))

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        return self._traced(method, self._channel.stream_unary(method, *args, **options))

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        return self._traced(method, self._channel.stream_stream(method, *args, **options))

    def _traced(self, method: str, multicallable: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any = None, **options: Any) -> Any:
            span = self._tracer.start_span(method[1:], None, SpanKind.CLIENT, _attributes(method, request))
            carrier: dict[str, str] = {}
            PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
            metadata = [*(options.pop("metadata", None) or ()), *carrier.items()]
            made = multicallable(request, metadata=metadata, **options)
            made.add_done_callback(lambda done: self._ended(span, done))
            return made

        return call

    def _ended(self, span: Span, call: grpc.aio.Call) -> None:
        task = asyncio.ensure_future(_end_as(span, call, time.time_ns()))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)
        await asyncio.gather(*self._endings)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def __aenter__(self) -> TracingChannel:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def _end_as(span: Span, call: grpc.aio.Call, at: int) -> None:
    _end(span, await call.code(), at)


def _end(span: Span, code: grpc.StatusCode, at: int | None = None) -> None:
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if code is not grpc.StatusCode.OK:
        span.set_status(Status(StatusCode.ERROR, code.name.lower()))
    span.end(at)


def _attributes(method: str, request: Any) -> dict[str, str]:
    service, _, name = method[1:].rpartition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    request_id = getattr(request, "request_id", "")
    return attributes | {"kvmesh.request_id": request_id} if request_id else attributes


def _headers(metadata: Any) -> dict[str, str]:
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def _code(context: Context) -> grpc.StatusCode:
    """grpc.aio gives a number, and 0 for a status that the handler left unset."""
    code = cast("int | grpc.StatusCode | None", context.code())
    return code if isinstance(code, grpc.StatusCode) else _CODES[code or 0]


def _why_cancelled(context: Context) -> grpc.StatusCode:
    remaining: float | None = context.time_remaining()
    late = remaining is not None and remaining <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
