"""The generator is open loop: what is slow or rejected delays nobody else."""

import asyncio
import json

import pytest

from kvmesh.bench.load import LoadGenerator, Tally
from kvmesh.bench.report import latency_table, plot_latencies, rates_lines
from kvmesh.bench.statistics import Slo, evaluate
from kvmesh.bench.targets import MeshTarget
from kvmesh.bench.workload import Arrival, Segment
from kvmesh.client import AsyncClient
from kvmesh.errors import Overloaded
from tests.unit.client.scripted_router import (
    ScriptedRouter,
    delta_message,
    finish_message,
    prompt_message,
    serving_router,
)

ANSWER = (prompt_message(), delta_message("Par", 1), delta_message("is", 2), finish_message())
ARRIVALS = [Arrival(i / 1000, (Segment(i, 5),), 2) for i in range(8)]


async def drive(router, arrivals, **options):
    tally = Tally(len(arrivals))
    async with serving_router(router) as address, AsyncClient(address) as client:
        return await LoadGenerator(MeshTarget(client), range(10, 20), **options).run(arrivals, tally), tally


async def test_each_request_asks_for_its_lengths():
    router = ScriptedRouter(ANSWER)
    records, tally = await drive(router, ARRIVALS)
    assert [record.status for record in records] == ["OK"] * 8
    assert {record.output_tokens for record in records} == {2}
    assert {record.cached_tokens for record in records} == {1}
    assert (tally.sent, tally.running, tally.tokens) == (8, 0, 16)
    request = router.requests[0]
    assert len(request.token_ids.ids) == 5
    assert (request.stopping.max_tokens, request.stopping.ignore_eos) == (2, True)


async def test_requests_do_not_wait_for_answers():
    """Nothing is ever answered; still every request goes out, and each ends by its timeout."""
    router = ScriptedRouter((prompt_message(), None))
    records, _ = await drive(router, ARRIVALS, timeout=0.5)
    assert len(router.requests) == 8
    assert [record.status for record in records] == ["DEADLINE_EXCEEDED"] * 8


async def test_a_run_ends_when_it_was_meant_to():
    """What still runs is cut off, with what it had brought."""
    router = ScriptedRouter((prompt_message(), delta_message("Par", 1), None))
    records, _ = await drive(router, ARRIVALS[:2], limit=3.0)
    assert [record.status for record in records] == ["DEADLINE_EXCEEDED"] * 2
    assert {record.output_tokens for record in records} == {1}


async def test_rejects_are_records_too():
    records, _ = await drive(ScriptedRouter([Overloaded("full")]), ARRIVALS[:3])
    assert [record.status for record in records] == ["RESOURCE_EXHAUSTED"] * 3
    assert evaluate(records, Slo()).attainment == 0.0


async def test_report_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    records, _ = await drive(ScriptedRouter(ANSWER), ARRIVALS)
    slo = Slo(ttft=1.0, tpot=0.5)
    report = evaluate(records, slo)
    assert latency_table(report).row_count == 5
    assert "8 served" in rates_lines(report, slo)[0]
    assert "TTFT <= 1000 ms and TPOT <= 500 ms" in rates_lines(report, slo)[2]
    await asyncio.to_thread(plot_latencies, records, slo, tmp_path / "latency.svg")
    assert (tmp_path / "latency.svg").read_text().count("<svg") == 1
    assert json.loads(json.dumps(report.statuses)) == {"OK": 8}
