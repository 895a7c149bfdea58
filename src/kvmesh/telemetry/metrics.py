"""The instruments of the mesh, typed; vLLM's base names where vLLM has them, so that its dashboards fit.

In Prometheus each is prefixed `kvmesh_`; counters end in `_total`. Knows no OpenTelemetry. An update costs a few
microseconds: per message or per step, never per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvmesh.types import WorkerStatistics

Labels = Mapping[str, str]

REQUEST_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
)  # fmt: skip
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.4, 1, 2.5, 5, 10)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
BYTES = tuple(4.0**power for power in range(5, 17))


class Counter(Protocol):
    def add(self, amount: float, attributes: Labels | None = None) -> None: ...


class Histogram(Protocol):
    def record(self, amount: float, attributes: Labels | None = None) -> None: ...


class Gauge(Protocol):
    def set(self, amount: float, attributes: Labels | None = None) -> None: ...


class Instruments(Protocol):
    """Makes instruments by their base name."""

    def counter(self, name: str, description: str) -> Counter: ...
    def histogram(self, name: str, description: str, buckets: Sequence[float]) -> Histogram: ...
    def gauge(self, name: str, description: str) -> Gauge: ...


class Metrics:
    """Every instrument of every service; one that a service never touches is not exported."""

    def __init__(self, make: Instruments) -> None:
        seconds, tokens = REQUEST_SECONDS, TOKENS
        self.time_to_first_token_seconds = make.histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", seconds
        )
        self.inter_token_latency_seconds = make.histogram(
            "inter_token_latency_seconds", "Between consecutive tokens of a sample.", TOKEN_SECONDS
        )
        self.request_time_per_output_token_seconds = make.histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first (TPOT).", TOKEN_SECONDS
        )
        self.e2e_request_latency_seconds = make.histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", seconds
        )
        self.request_queue_time_seconds = make.histogram(
            "request_queue_time_seconds", "Waiting for admission.", seconds
        )
        self.request_prefill_time_seconds = make.histogram(
            "request_prefill_time_seconds", "Computing the prompt.", seconds
        )
        self.request_decode_time_seconds = make.histogram(
            "request_decode_time_seconds", "From the first token to the last.", seconds
        )
        self.kv_transfer_seconds = make.histogram(
            "kv_transfer_seconds", "Fetching the chunks of a prompt into the block pool.", seconds
        )
        self.kv_transfer_bytes = make.histogram("kv_transfer_bytes", "Bitstream bytes fetched for a prompt.", BYTES)
        self.request_prompt_tokens = make.histogram("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self.request_generation_tokens = make.histogram(
            "request_generation_tokens", "Output tokens of a request.", tokens
        )
        self.prompt_tokens = make.counter("prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = make.counter("generation_tokens", "Output tokens generated.")
        self.request_success = make.counter("request_success", "Requests that ended well, by finished_reason.")
        self.request_failure = make.counter("request_failure", "Requests that did not, by status code.")
        self.request_recoveries = make.counter("request_recoveries", "Requests continued on another worker, by phase.")
        self.num_preemptions = make.counter("num_preemptions", "Sequences that lost their blocks and were recomputed.")
        self.prefix_cache_queries = make.counter("prefix_cache_queries", "Prompt tokens looked up in a prefix cache.")
        self.prefix_cache_hits = make.counter("prefix_cache_hits", "Prompt tokens found in a prefix cache.")
        self.chunk_queries = make.counter("chunk_queries", "Chunks asked of a store.")
        self.chunk_hits = make.counter("chunk_hits", "Chunks served by a store.")
        self.chunk_corruptions = make.counter("chunk_corruptions", "Chunks dropped because a check failed.")
        self.tier_hits = make.counter("tier_hits", "Reads that found their chunk in a tier of a store.")
        self.tier_misses = make.counter("tier_misses", "Reads that looked for their chunk in a tier in vain.")
        self.tier_read_bytes = make.counter("tier_read_bytes", "Bytes of bitstreams read from a tier.")
        self.tier_evictions = make.counter("tier_evictions", "Chunks that left a tier for good to make room.")
        self.kv_fetched_bytes = make.counter("kv_fetched_bytes", "Bytes of bitstreams fetched from stores.")
        self.kv_published_bytes = make.counter("kv_published_bytes", "Bytes of bitstreams put into stores.")
        self.kv_fetched_chunks = make.counter("kv_fetched_chunks", "Chunks fetched from stores, by quality.")
        self.kv_missed_chunks = make.counter("kv_missed_chunks", "Chunks that could not be fetched or used.")
        self.kv_missed_replicas = make.counter("kv_missed_replicas", "Puts that only other owners of a chunk took.")
        self.kv_recomputed_tokens = make.counter("kv_recomputed_tokens", "Tokens computed though their KV was stored.")
        self.num_requests_running = make.gauge("num_requests_running", "Requests in the running batch.")
        self.num_requests_waiting = make.gauge("num_requests_waiting", "Requests queued.")
        self.kv_cache_usage_perc = make.gauge("kv_cache_usage_perc", "Share of KV blocks in use; 1 is full.")
        self.num_leases = make.gauge("num_leases", "Leases held.")
        self.stored_bytes = make.gauge("stored_bytes", "Bytes of chunks held, by tier.")
        self.power_watts = make.gauge("power_watts", "Power drawn, by the domain that was measured.")
        self.power_level = make.gauge("power_level", "How far power capping has gone: 0 not at all, 4 brakes everyone.")
        self.energy_joules = make.counter("energy_joules", "Energy drawn since the start, by domain.")

    def observe(self, statistics: WorkerStatistics) -> None:
        """Sets the gauges from a reading."""
        self.num_requests_running.set(statistics.running)
        self.num_requests_waiting.set(statistics.waiting)
        self.kv_cache_usage_perc.set(statistics.blocks_used / max(1, statistics.blocks_total))
        self.num_leases.set(statistics.leases)
        self.stored_bytes.set(statistics.memory_bytes, {"tier": "memory"})
        self.stored_bytes.set(statistics.disk_bytes, {"tier": "disk"})


class NoopInstrument:
    def add(self, amount: float, attributes: Labels | None = None) -> None: ...
    def record(self, amount: float, attributes: Labels | None = None) -> None: ...
    def set(self, amount: float, attributes: Labels | None = None) -> None: ...


class NoopInstruments:
    _instrument = NoopInstrument()

    def counter(self, name: str, description: str) -> Counter:
        return self._instrument

    def histogram(self, name: str, description: str, buckets: Sequence[float]) -> Histogram:
        return self._instrument

    def gauge(self, name: str, description: str) -> Gauge:
        return self._instrument
