"""Sampling against closed forms, brute force and transformers' logits processors."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvmesh.engine.batch import Draw
from kvmesh.engine.sampling import adjust, distribution, invert, sample, uniform
from kvmesh.types import SamplingParams

VOCABULARY = 50


def draw(offset=0, index=0, prompt=(), output=(), **params) -> Draw:
    return Draw(SamplingParams(max_tokens=100, **params), index, offset, list(prompt), list(output))


def logits_of(seed: int, rows: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def tokens_of(logits, draws) -> list[int]:
    return [sampled.token_id for sampled in sample(logits, draws)]


# Greedy


def test_greedy_is_argmax():
    logits = logits_of(0, 8)
    assert tokens_of(logits, [draw(temperature=0.0)] * 8) == logits.argmax(-1).tolist()


def test_a_tiny_temperature_is_greedy():
    logits = logits_of(1)
    assert tokens_of(logits, [draw(temperature=1e-300)]) == logits.argmax(-1).tolist()


# Randomness


def chi_square(counts: Counter, expected: torch.Tensor, samples: int) -> float:
    return sum((counts[i] - samples * p) ** 2 / (samples * p) for i, p in enumerate(expected.tolist()) if p > 0)


@pytest.mark.parametrize("params", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_draws_follow_the_distribution(params):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -0.5, 0.2])
    weights = distribution(logits, SamplingParams(max_tokens=1, **params))
    expected, samples = weights / weights.sum(), 4000
    counts = Counter(tokens_of(logits.expand(samples, -1), [draw(offset=i, seed=3, **params) for i in range(samples)]))
    assert not [token for token in counts if expected[token] == 0]
    assert chi_square(counts, expected, samples) < 24.3  # 7 degrees of freedom, p = 0.001


def test_a_distribution_without_truncation_is_softmax():
    logits = logits_of(2)[0]
    expected = torch.softmax(logits.double() / 0.7, -1)
    torch.testing.assert_close(distribution(logits, SamplingParams(max_tokens=1, temperature=0.7)), expected)


def test_seed_index_and_offset_each_change_the_draw_and_nothing_else_does():
    logits = torch.zeros(VOCABULARY)
    draws = [draw(seed=s, index=i, offset=o) for s in range(4) for i in range(4) for o in range(4)]
    alone = [tokens_of(logits.unsqueeze(0), [one])[0] for one in draws]
    noise = [draw(seed=99, temperature=0.3), draw(temperature=0.0)]
    batched = tokens_of(logits.expand(len(draws) + 2, -1), [*noise, *draws])[2:]
    assert batched == alone
    assert len({uniform(s, i, o) for s in range(4) for i in range(4) for o in range(4)}) == 64


def test_uniform_is_the_same_everywhere():
    """Frozen values: another worker, version or platform must draw the same."""
    assert [uniform(0, 0, 0), uniform(42, 1, 7), uniform(-1, 0, 2**40)] == [
        0.13870941014555427,
        0.10584086659863745,
        0.5370479911551934,
    ]


def test_uniform_fills_the_unit_interval():
    values = torch.tensor([uniform(5, 0, offset) for offset in range(20000)], dtype=torch.float64)
    assert values.min() >= 0
    assert values.max() < 1
    distance = (values.sort().values - torch.arange(20000) / 20000).abs().max()
    assert distance < 1.95 / math.sqrt(20000)  # Kolmogorov-Smirnov, p = 0.001


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1e-12]), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_inversion_never_returns_a_weightless_token(weights, position):
    if any(weights):
        assert weights[invert(torch.tensor(weights, dtype=torch.float64), position)] > 0


# Truncation


def transformers_set(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    scores = TemperatureLogitsWarper(params.temperature)(None, logits.double().unsqueeze(0))
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return set(scores[0].isfinite().nonzero().flatten().tolist())


truncations = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, VOCABULARY + 5),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1000), truncations)
def test_the_kept_set_is_that_of_transformers(seed, params):
    logits = logits_of(seed)[0]
    kept = distribution(logits, params).nonzero().flatten().tolist()
    assert set(kept) == transformers_set(logits, params)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=60), truncations)
def test_truncation_invariants(values, params):
    logits = torch.tensor(values)
    weights = distribution(logits, params)
    full = torch.softmax(logits.double() / params.temperature, -1)
    kept = weights > 0
    assert kept[int(logits.argmax())]
    assert torch.equal(weights[kept], full[kept])
    assert full[kept].min() >= full[~kept].max() if (~kept).any() else True
    if params.top_k and len(full.unique()) == len(full):
        assert int(kept.sum()) <= params.top_k


def test_top_p_with_a_flat_tail_beyond_the_partial_sort():
    logits = torch.arange(5000, dtype=torch.float32) * 1e-5
    kept = int((distribution(logits, SamplingParams(max_tokens=1, top_p=0.5)) > 0).sum())
    assert kept == pytest.approx(2500 - 31, abs=31)


def test_ties_are_kept_together():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    for params in ({"top_k": 2}, {"top_p": 0.3}):
        kept = distribution(logits, SamplingParams(max_tokens=1, **params)).nonzero().flatten().tolist()
        assert kept == [1, 2, 3]


# Penalties


@given(st.lists(st.integers(0, 49), max_size=20), st.lists(st.integers(0, 49), max_size=20), st.floats(0.5, 2.0))
def test_repetition_penalty_is_that_of_transformers(prompt, output, penalty):
    logits = logits_of(4)
    adjusted = adjust(logits[0], draw(prompt=prompt, output=output, repetition_penalty=penalty))
    expected = logits
    if prompt + output:
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
    torch.testing.assert_close(adjusted, expected[0])


@given(st.lists(st.integers(0, 49), max_size=30), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_count_the_output_only(output, presence, frequency):
    logits, counts = logits_of(5)[0], Counter(output)
    adjusted = adjust(
        logits, draw(prompt=[1, 2, 3], output=output, presence_penalty=presence, frequency_penalty=frequency)
    )
    for token in range(VOCABULARY):
        expected = logits[token].item() - frequency * counts[token] - presence * (counts[token] > 0)
        assert adjusted[token].item() == pytest.approx(expected, abs=1e-4)


def test_bias_can_force_and_forbid():
    logits = logits_of(6)
    best = int(logits.argmax())
    assert tokens_of(logits, [draw(temperature=0.0, logit_bias={7: 100.0})]) == [7]
    assert tokens_of(logits, [draw(temperature=0.0, logit_bias={best: -100.0})]) != [best]


def test_endings_are_masked_until_min_tokens():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3], logits[0, 4], logits[0, 5] = 9.0, 8.0, 7.0
    ends = {"eos_token_ids": frozenset({3}), "stop_token_ids": frozenset({4}), "min_tokens": 2, "temperature": 0.0}
    assert [tokens_of(logits, [draw(offset=o, **ends)])[0] for o in range(3)] == [5, 5, 3]
    assert tokens_of(logits, [draw(min_tokens=2, temperature=0.0)]) == [3]


def test_penalties_of_one_row_leave_the_others_and_the_input_alone():
    logits = logits_of(8, 3)
    before = logits.clone()
    best = logits.argmax(-1).tolist()
    tokens = tokens_of(
        logits, [draw(temperature=0.0), draw(temperature=0.0, logit_bias={best[1]: -100.0}), draw(temperature=0.0)]
    )
    assert [tokens[0], tokens[2]] == [best[0], best[2]]
    assert tokens[1] != best[1]
    assert torch.equal(logits, before)


# Logprobs


def test_logprobs_are_natural_logs_before_temperature():
    logits = logits_of(9)
    expected = logits[0].double().log_softmax(-1)
    for temperature in (0.0, 0.5, 1.5):
        sampled = sample(logits, [draw(temperature=temperature, logprobs=3, top_k=1)])[0]
        assert sampled.logprobs is not None
        assert sampled.logprobs.chosen.token_id == sampled.token_id
        assert sampled.logprobs.chosen.logprob == pytest.approx(expected[sampled.token_id].item())
        assert [top.token_id for top in sampled.logprobs.top] == expected.topk(3).indices.tolist()
        assert [top.logprob for top in sampled.logprobs.top] == pytest.approx(expected.topk(3).values.tolist())


def test_logprobs_come_after_penalties_and_bias():
    logits = logits_of(10)
    sampled = sample(logits, [draw(temperature=0.0, logit_bias={7: 100.0}, logprobs=0)])[0]
    assert sampled.logprobs is not None
    assert sampled.logprobs.chosen.logprob == pytest.approx(0.0, abs=1e-9)
    assert sampled.logprobs.top == ()


def test_no_logprobs_unless_asked():
    assert sample(logits_of(11), [draw()])[0].logprobs is None
