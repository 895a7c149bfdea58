"""What the mesh measures and traces with, as interfaces that cost nothing when nobody listens.

Knows no OpenTelemetry: `kvmesh.telemetry.otel` fills these in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from kvmesh.telemetry.metrics import Metrics, NoopInstruments

Attributes = Mapping[str, str | bool | int | float]


class Span(Protocol):
    """The part of an OpenTelemetry span that the mesh uses."""

    def set_attribute(self, key: str, value: str | bool | int | float) -> None: ...
    def add_event(self, name: str, attributes: Attributes | None = None) -> None: ...
    def record_exception(self, exception: BaseException) -> None: ...
    def end(self) -> None: ...


class Tracer(Protocol):
    """The part of an OpenTelemetry tracer that the mesh uses."""

    def start_span(self, name: str, *, attributes: Attributes | None = None) -> Span: ...

    def start_as_current_span(
        self, name: str, *, attributes: Attributes | None = None
    ) -> AbstractContextManager[Span]: ...


class NoopSpan:
    def set_attribute(self, key: str, value: str | bool | int | float) -> None: ...
    def add_event(self, name: str, attributes: Attributes | None = None) -> None: ...
    def record_exception(self, exception: BaseException) -> None: ...
    def end(self) -> None: ...


class NoopTracer:
    _span = NoopSpan()

    def start_span(self, name: str, *, attributes: Attributes | None = None) -> Span:
        return self._span

    def start_as_current_span(self, name: str, *, attributes: Attributes | None = None) -> AbstractContextManager[Span]:
        return nullcontext(self._span)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Handed to whoever traces or counts; there are no global providers."""

    tracer: Tracer
    metrics: Metrics
    tracing: bool = False
    """Spans go somewhere: `tracer` is an OpenTelemetry tracer, and calls carry the W3C context."""
    metrics_port: int | None = None
    """Where Prometheus text is served, as actually bound."""
    on_shutdown: Callable[[], Any] = lambda: None

    def shutdown(self) -> None:
        """Flushes what is pending and stops serving metrics; may take a few seconds if a collector is away."""
        self.on_shutdown()


def noop() -> Telemetry:
    """Traces and counts nothing."""
    return Telemetry(NoopTracer(), Metrics(NoopInstruments()))
