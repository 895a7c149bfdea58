"""OpenTelemetry behind the interfaces of `kvmesh.telemetry`: the only module that builds its providers.

Reads no environment: what the SDK would take from there is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from prometheus_client import CollectorRegistry, start_http_server

from kvmesh.telemetry.metrics import Counter, Gauge, Histogram
from kvmesh.telemetry.spans import JsonLinesExporter

EXPORT_TIMEOUT = 2.0
"""Seconds that a collector has to take a batch; a shutdown waits no longer than about this."""


def resource(service: str, worker_id: str) -> Resource:
    return Resource({"service.namespace": "kvmesh", "service.name": service, "service.instance.id": worker_id})


def tracer_provider(resource: Resource, otlp_endpoint: str | None, trace_file: Path | None) -> TracerProvider:
    """Exports to a collector in batches, to a file at once: it has every span up to the moment of a crash."""
    provider = TracerProvider(resource=resource, sampler=ParentBased(ALWAYS_ON), shutdown_on_exit=False)
    if otlp_endpoint:
        exporter = OTLPSpanExporter(endpoint=otlp_endpoint, timeout=EXPORT_TIMEOUT)
        provider.add_span_processor(BatchSpanProcessor(exporter))
    if trace_file:
        provider.add_span_processor(SimpleSpanProcessor(JsonLinesExporter(trace_file)))
    return provider


class PrometheusEndpoint:
    """`GET /metrics` on `port`, from a thread of its own."""

    def __init__(self, resource: Resource, host: str, port: int) -> None:
        registry = CollectorRegistry()
        reader = PrometheusMetricReader(scope_info_enabled=False, registry=registry)
        self._provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._server, self._thread = start_http_server(port, host, registry)
        self.port = int(self._server.server_port)
        self.instruments = OtelInstruments(self._provider.get_meter("kvmesh"))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._provider.shutdown()


class OtelInstruments:
    """Units are in the names, as Prometheus has them; with a unit given, the exporter would append it again."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def counter(self, name: str, description: str) -> Counter:
        return cast(Counter, self._meter.create_counter(f"kvmesh_{name}", description=description))

    def histogram(self, name: str, description: str, buckets: Sequence[float]) -> Histogram:
        histogram = self._meter.create_histogram(
            f"kvmesh_{name}", description=description, explicit_bucket_boundaries_advisory=buckets
        )
        return cast(Histogram, histogram)

    def gauge(self, name: str, description: str) -> Gauge:
        return cast(Gauge, self._meter.create_gauge(f"kvmesh_{name}", description=description))
