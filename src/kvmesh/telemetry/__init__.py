"""Traces and metrics: built once by a service's `__main__`, handed to whoever needs them.

    api      the interfaces, and the no-op
    metrics  every instrument, by name
    otel     OpenTelemetry behind them (extra [telemetry]); spans: its exporter to a file

Knows no service; `kvmesh.rpc.tracing` makes the spans of calls.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from kvmesh.errors import Unavailable
from kvmesh.telemetry.api import NoopTracer, Span, Telemetry, Tracer, noop
from kvmesh.telemetry.metrics import Metrics, NoopInstruments

__all__ = ["Metrics", "Span", "Telemetry", "Tracer", "noop", "setup"]

logger = logging.getLogger(__name__)


def setup(
    service: str,
    worker_id: str,
    *,
    otlp_endpoint: str | None = None,
    metrics_port: int | None = None,
    trace_file: Path | None = None,
    metrics_host: str = "127.0.0.1",
) -> Telemetry:
    """Traces if there is an endpoint or a file, counts if there is a port (0: any); otherwise costs nothing.

    Without OpenTelemetry installed it warns and does nothing: a mesh serves without being watched.

    Raises:
        Unavailable: the metrics port or the trace file cannot be had.
    """
    wanted = bool(otlp_endpoint or trace_file) or metrics_port is not None
    if not wanted:
        return noop()
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        logger.warning("no traces and metrics: install kvmesh[telemetry]")
        return noop()
    try:
        return _setup(service, worker_id, otlp_endpoint, metrics_port, trace_file, metrics_host)
    except OSError as error:
        raise Unavailable(f"telemetry cannot start: {error}") from error


def _setup(
    service: str,
    worker_id: str,
    otlp_endpoint: str | None,
    metrics_port: int | None,
    trace_file: Path | None,
    metrics_host: str,
) -> Telemetry:
    from kvmesh.telemetry import otel  # The extra may be missing.

    resource = otel.resource(service, worker_id)
    tracer: Tracer = NoopTracer()
    metrics, port = Metrics(NoopInstruments()), None
    tracing = bool(otlp_endpoint or trace_file)
    with ExitStack() as undo:
        if tracing:
            provider = otel.tracer_provider(resource, otlp_endpoint, trace_file)
            undo.callback(provider.shutdown)
            tracer = cast(Tracer, provider.get_tracer("kvmesh"))
        if metrics_port is not None:
            endpoint = otel.PrometheusEndpoint(resource, metrics_host, metrics_port)
            undo.callback(endpoint.close)
            metrics, port = Metrics(endpoint.instruments), endpoint.port
        return Telemetry(tracer, metrics, tracing, port, undo.pop_all().close)
