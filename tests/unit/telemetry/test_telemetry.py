"""What is actually scraped and written; and that nothing is, when nobody asked."""

import json
import os
import subprocess
import sys
import urllib.request

import pytest

from kvmesh import telemetry
from kvmesh.errors import Unavailable
from kvmesh.types import WorkerStatistics


@pytest.fixture
def counted():
    made = telemetry.setup("router", "router-1", metrics_port=0)
    yield made
    made.shutdown()


def scrape(made):
    with urllib.request.urlopen(f"http://127.0.0.1:{made.metrics_port}/metrics", timeout=5) as reply:
        return reply.read().decode()


def sample(text, name):
    """The values of a metric by its labels, the scope's left out."""
    found = {}
    for line in text.splitlines():
        if line.startswith((name + "{", name + " ")):
            labels, _, value = line[len(name) :].rpartition(" ")
            kept = [label for label in labels.strip("{}").split(",") if label and not label.startswith("otel_scope")]
            found[",".join(kept)] = float(value)
    return found


def test_names_are_those_of_vllm(counted):
    metrics = counted.metrics
    metrics.time_to_first_token_seconds.record(0.03)
    metrics.inter_token_latency_seconds.record(0.004)
    metrics.e2e_request_latency_seconds.record(1.5)
    metrics.request_success.add(1, {"finished_reason": "stop"})
    for counter in (
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
    ):
        getattr(metrics, counter).add(7)
    metrics.observe(WorkerStatistics(running=3, waiting=4, blocks_total=10, blocks_used=5, disk_bytes=9))
    text = scrape(counted)
    assert sample(text, "kvmesh_time_to_first_token_seconds_count") == {"": 1}
    assert sample(text, "kvmesh_time_to_first_token_seconds_sum") == {"": 0.03}
    buckets = sample(text, "kvmesh_time_to_first_token_seconds_bucket")
    assert (buckets['le="0.02"'], buckets['le="0.04"'], buckets['le="+Inf"']) == (0, 1, 1)
    assert sample(text, "kvmesh_inter_token_latency_seconds_bucket")['le="0.005"'] == 1
    assert sample(text, "kvmesh_e2e_request_latency_seconds_count") == {"": 1}
    assert sample(text, "kvmesh_request_success_total") == {'finished_reason="stop"': 1}
    for counter in (
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
    ):
        assert sample(text, f"kvmesh_{counter}_total") == {"": 7}
    assert sample(text, "kvmesh_num_requests_running") == {"": 3}
    assert sample(text, "kvmesh_num_requests_waiting") == {"": 4}
    assert sample(text, "kvmesh_kv_cache_usage_perc") == {"": 0.5}
    assert sample(text, "kvmesh_stored_bytes") == {'tier="memory"': 0, 'tier="disk"': 9}
    assert 'service_instance_id="router-1"' in text


def test_every_instrument_is_named_after_its_attribute(counted):
    for name, instrument in vars(counted.metrics).items():
        update = next(getattr(instrument, verb) for verb in ("add", "record", "set") if hasattr(instrument, verb))
        update(1)
        assert f"kvmesh_{name}" in scrape(counted)


def test_two_services_in_one_process_do_not_mix(counted):
    other = telemetry.setup("decode", "decode-1", metrics_port=0)
    other.metrics.prompt_tokens.add(1)
    assert other.metrics_port != counted.metrics_port
    assert sample(scrape(counted), "kvmesh_prompt_tokens_total") == {}
    other.shutdown()


def test_a_metrics_port_in_use_is_one_clear_error(counted):
    with pytest.raises(Unavailable, match="telemetry cannot start"):
        telemetry.setup("router", "router-2", metrics_port=counted.metrics_port)


def test_a_shut_down_endpoint_frees_its_port():
    made = telemetry.setup("router", "router-1", metrics_port=0)
    made.shutdown()
    again = telemetry.setup("router", "router-1", metrics_port=made.metrics_port)
    assert again.metrics_port == made.metrics_port
    again.shutdown()


def test_spans_are_appended_as_json_lines(tmp_path):
    path = tmp_path / "spans.jsonl"
    made = [telemetry.setup(name, f"{name}-1", trace_file=path) for name in ("router", "decode")]
    with made[0].tracer.start_as_current_span("outer", attributes={"tokens": 3}) as outer:
        outer.add_event("first token")
        made[1].tracer.start_span("inner").end()
    with pytest.raises(ZeroDivisionError), made[0].tracer.start_as_current_span("broken"):
        raise ZeroDivisionError("by zero")
    for each in made:
        each.shutdown()
    inner, outer, broken = map(json.loads, path.read_text().splitlines())
    assert (inner["name"], inner["service"], inner["worker_id"]) == ("inner", "decode", "decode-1")
    assert inner["trace_id"] == outer["trace_id"]
    assert inner["parent_span_id"] == outer["span_id"]
    assert outer["parent_span_id"] is None
    assert outer["kind"] == "INTERNAL"
    assert outer["attributes"] == {"tokens": 3}
    assert [event["name"] for event in outer["events"]] == ["first token"]
    assert outer["start"] <= inner["start"] <= inner["end"] <= outer["end"]
    assert broken["status"] == "ERROR"


def test_a_trace_file_that_cannot_be_had_is_one_clear_error(tmp_path):
    with pytest.raises(Unavailable, match="nowhere"):
        telemetry.setup("router", "router-1", trace_file=tmp_path / "nowhere" / "spans.jsonl")


def test_a_collector_that_is_away_does_not_hold_up_the_end():
    made = telemetry.setup("router", "router-1", otlp_endpoint="http://127.0.0.1:1")
    assert made.tracing
    made.tracer.start_span("lost").end()
    made.shutdown()


def test_nothing_asked_is_nothing_done():
    for made in (telemetry.setup("router", "router-1"), telemetry.noop()):
        assert not made.tracing
        assert made.metrics_port is None
        with made.tracer.start_as_current_span("x", attributes={"a": 1}) as span:
            span.set_attribute("b", 2)
            span.add_event("c")
            span.record_exception(ValueError())
        made.tracer.start_span("y").end()
        made.metrics.prompt_tokens.add(1)
        made.metrics.e2e_request_latency_seconds.record(1)
        made.metrics.observe(WorkerStatistics())
        made.shutdown()


def test_it_works_without_opentelemetry(tmp_path):
    """As in an installation without the extra, which a folder of an empty package stands for."""
    program = (
        "from kvmesh import telemetry; import kvmesh.rpc.server, kvmesh.rpc.channel\n"
        "made = telemetry.setup('router', 'router-1', metrics_port=0)\n"
        "assert not made.tracing and made.metrics_port is None\n"
        "made.metrics.prompt_tokens.add(1); made.shutdown()\n"
    )
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "install kvmesh[telemetry]" in done.stderr
