"""Arrivals: the law of the process, the two trace formats, and what prompts share."""

import itertools
import json
import statistics

import pytest

from kvmesh.bench.prompts import synthesise, vocabulary_range
from kvmesh.bench.workload import Arrival, Lengths, Segment, fit, poisson, read_trace
from kvmesh.errors import InvalidArgument, NotFound


def test_poisson_gaps_have_the_mean_and_the_variance_of_the_law():
    arrivals = poisson(4.0, 20_000, Lengths(8, 8), Lengths(2, 2), seed=1)
    gaps = [b.at - a.at for a, b in itertools.pairwise(arrivals)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(1.0, rel=0.05)


def test_same_seed_same_workload():
    first, again, other = (poisson(2.0, 20, Lengths(4, 90), Lengths(1, 9), seed=seed) for seed in (5, 5, 6))
    assert first == again != other


def test_poisson_lengths_and_sharing():
    arrivals = poisson(2.0, 50, Lengths(10, 40), Lengths(3, 3), shared_tokens=20, shared_prefixes=2)
    assert all(10 <= arrival.prompt_tokens <= 40 for arrival in arrivals)
    assert {arrival.prompt[0].id for arrival in arrivals} == {-1, -2}
    assert max(arrival.prompt[0].tokens for arrival in arrivals) == 20


@pytest.mark.parametrize(("text", "low", "high"), [("5", 5, 5), ("64-256", 64, 256)])
def test_lengths(text, low, high):
    assert Lengths.parse(text) == Lengths(low, high)


@pytest.mark.parametrize("text", ["", "0", "9-3", "x", "-4", "1-2-3"])
def test_bad_lengths(text):
    with pytest.raises(InvalidArgument, match="not a length"):
        Lengths.parse(text)


def azure(folder, *rows):
    path = folder / "trace.csv"
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


def test_azure_trace(tmp_path):
    path = azure(tmp_path, "2023-11-16 18:17:03.9799600,4808,10", "2023-11-16 18:17:05.9799600,3180,8")
    arrivals = read_trace(path, speedup=4.0)
    assert [arrival.at for arrival in arrivals] == pytest.approx([0.0, 0.5])
    assert [(a.prompt_tokens, a.output_tokens) for a in arrivals] == [(4808, 10), (3180, 8)]
    assert len(read_trace(path, limit=1)) == 1


def test_mooncake_trace_shares_prefixes_and_spreads_ticks(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 2]},
        {"timestamp": 3000, "input_length": 10, "output_length": 0, "hash_ids": [3]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arrivals = read_trace(path)
    assert arrivals[0].prompt == (Segment(0, 512), Segment(1, 188))
    assert 0.0 < arrivals[1].at < 3.0
    assert (arrivals[2].at, arrivals[2].output_tokens) == (3.0, 1)
    vocabulary = vocabulary_range(1000)
    first, second = (synthesise(arrival.prompt, vocabulary) for arrival in arrivals[:2])
    assert first[:512] == second[:512]
    assert first[512:520] != second[512:520]


@pytest.mark.parametrize("row", ["yesterday,5,5", "2023-11-16 18:17:03,five,5", "2023-11-16 18:17:03"])
def test_a_bad_line_is_named(tmp_path, row):
    with pytest.raises(InvalidArgument, match="line 3"):
        read_trace(azure(tmp_path, "2023-11-16 18:17:03,5,5", row))


def test_a_bad_mooncake_line_is_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0]}\n')
    with pytest.raises(InvalidArgument, match="line 1"):
        read_trace(path)


def test_a_missing_trace(tmp_path):
    with pytest.raises(NotFound, match="no-such"):
        read_trace(tmp_path / "no-such.csv")


def test_fit_cuts_to_the_context():
    arrival = Arrival(0.0, (Segment(0, 512), Segment(1, 512)), 400)
    cut = fit(arrival, max_model_len=1024)
    assert (cut.prompt_tokens, cut.output_tokens) == (624, 400)
    assert cut.prompt[0] == Segment(0, 512)
    assert fit(arrival, 1024, max_prompt=100, max_output=7).prompt == (Segment(0, 100),)
    assert fit(arrival, 4096) == arrival


def test_prompts_have_the_lengths_asked_and_stay_in_range():
    tokens = synthesise((Segment(1, 300), Segment(2, 7)), vocabulary_range(512))
    assert len(tokens) == 307
    assert all(128 <= token < 256 for token in tokens)
    assert synthesise((Segment(1, 50),), vocabulary_range(512)) == tokens[:50]
