"""Figures against closed forms and numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.bench.statistics import Record, Slo, evaluate, percentile, summary


def record(ttft=0.1, tpot=0.01, tokens=11, scheduled=0.0, status="OK", **fields):
    """One token at `scheduled + ttft`, then one every `tpot`."""
    arrivals = tuple((scheduled + ttft + i * tpot, 1) for i in range(tokens))
    ended = arrivals[-1][0] if arrivals else scheduled
    return Record(scheduled, scheduled, ended, status, arrivals=arrivals, **fields)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentile_is_numpys(values, quantile):
    assert percentile(values, quantile) == pytest.approx(np.quantile(values, quantile), rel=1e-9, abs=1e-6)


def test_nothing_has_no_percentile():
    assert math.isnan(percentile([], 0.5))
    assert summary([]) == {}


def test_times_of_one_request():
    one = record(ttft=0.5, tpot=0.1, tokens=11, scheduled=3.0)
    assert one.ttft == pytest.approx(0.5)
    assert one.tpot == pytest.approx(0.1)
    assert one.e2e == pytest.approx(1.5)
    assert one.gaps == pytest.approx([0.1] * 10)


def test_ttft_counts_from_the_schedule_not_from_the_sending():
    late = Record(scheduled=1.0, sent=3.0, ended=4.0, status="OK", arrivals=((4.0, 1),))
    assert late.ttft == pytest.approx(3.0)


def test_coalesced_tokens_share_the_gap_before_them():
    """4 tokens after the first in two messages, over one second: 0.25 s each."""
    one = Record(0.0, 0.0, 2.0, "OK", arrivals=((1.0, 1), (1.5, 2), (2.0, 2)))
    assert one.tpot == pytest.approx(0.25)
    assert one.gaps == pytest.approx([0.5, 0.5])


def test_a_single_message_has_no_tpot():
    assert Record(0.0, 0.0, 1.0, "OK", arrivals=((1.0, 4),)).tpot is None
    assert Record(0.0, 0.0, 1.0, "OK").tpot is None


def test_goodput_is_joint_and_rejects_are_misses():
    """Ten over ten seconds: 6 good, 1 late first token, 1 slow, 2 rejected."""
    records = [record(scheduled=i) for i in range(6)]
    records += [record(ttft=2.0, scheduled=6.0), record(tpot=0.5, tokens=2, scheduled=7.0)]
    records += [record(tokens=0, scheduled=8.0, status="RESOURCE_EXHAUSTED")]
    records += [Record(8.0, 8.0, 10.0, "UNAVAILABLE")]
    report = evaluate(records, Slo(ttft=1.0, tpot=0.1))
    assert report.duration == pytest.approx(10.0)
    assert report.statuses == {"OK": 8, "RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1}
    assert (report.ttft_attainment, report.tpot_attainment) == pytest.approx((0.7, 0.7))
    assert report.attainment == pytest.approx(0.6)
    assert report.goodput == pytest.approx(0.6)
    assert report.request_rate == pytest.approx(0.8)


def test_without_bounds_goodput_is_throughput():
    report = evaluate([record(scheduled=i) for i in range(5)], Slo())
    assert report.goodput == pytest.approx(report.request_rate)
    assert report.attainment == 1.0


def test_token_rates_and_cached_share():
    records = [record(prompt_tokens=30, cached_tokens=10), record(prompt_tokens=10, cached_tokens=10)]
    report = evaluate(records, Slo())
    assert report.cached_share == pytest.approx(0.5)
    assert report.prompt_token_rate == pytest.approx(40 / 0.2)
    assert report.output_token_rate == pytest.approx(22 / 0.2)


def test_percentiles_of_the_report():
    report = evaluate([record(ttft=(i + 1) / 100) for i in range(100)], Slo())
    expected = np.quantile([(i + 1) / 100 for i in range(100)], [0.5, 0.9, 0.99])
    assert [report.ttft[name] for name in ("p50", "p90", "p99")] == pytest.approx(list(expected))


def test_all_failed():
    report = evaluate([Record(0.0, 0.0, 1.0, "UNAVAILABLE")], Slo(ttft=1.0))
    assert (report.goodput, report.ttft, report.request_rate) == (0.0, {}, 0.0)
