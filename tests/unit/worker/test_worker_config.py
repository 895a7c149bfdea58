"""The environment of an engine process, and the small parts that turn readings into messages."""

import os
import subprocess
import sys

import pytest

from kvmesh.engine.api import Admitted, TokenOutput
from kvmesh.telemetry import noop
from kvmesh.types import FinishReason, PositionLogprobs, TokenBatch, TokenLogprob, WorkerStatistics
from kvmesh.worker.config import WorkerConfig
from kvmesh.worker.meter import Meter
from kvmesh.worker.tokens import batches


@pytest.mark.parametrize("service", ["kvmesh_prefill", "kvmesh_decode"])
def test_all_bad_values_are_reported_together_without_a_traceback(service: str) -> None:
    bad = {"KVMESH_PORT": "99999", "KVMESH_THREADS": "many", "KVMESH_LOG_LEVEL": "loud", "KVMESH_MODEL": "fake"}
    done = subprocess.run(
        [sys.executable, "-m", service], env={**os.environ, **bad}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert all(name in done.stderr for name in ("KVMESH_PORT", "KVMESH_THREADS", "KVMESH_LOG_LEVEL"))
    assert "Traceback" not in done.stderr


def test_the_collector_has_its_standard_name() -> None:
    assert WorkerConfig(**{"OTEL_EXPORTER_OTLP_ENDPOINT": "there"}).otlp_endpoint == "there"
    assert WorkerConfig(otlp_endpoint="here").otlp_endpoint == "here"


def test_what_is_ready_becomes_one_batch_a_sample() -> None:
    logprobs = PositionLogprobs(TokenLogprob(5, -1.0))
    events = [
        Admitted("r", 0),
        TokenOutput("r", 1, 3, 7),
        TokenOutput("r", 0, 3, 5, logprobs),
        TokenOutput("r", 1, 4, 9, None, FinishReason.STOP, 9, last=True),
    ]
    assert batches(events) == [
        TokenBatch(0, 3, (5,), (logprobs,)),
        TokenBatch(1, 3, (7, 9), (), FinishReason.STOP, 9),
    ]
    assert batches([Admitted("r", 0)]) == []


def test_counters_grow_by_what_was_new() -> None:
    class Counter:
        total = 0.0

        def add(self, amount: float, attributes: object = None) -> None:
            self.total += amount

    metrics, tokens = noop().metrics, Counter()
    metrics.generation_tokens = tokens
    meter = Meter(metrics)
    for total in (5, 5, 12):
        meter.observe(WorkerStatistics(tokens_total=total))
    assert tokens.total == 12
