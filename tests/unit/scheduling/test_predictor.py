"""Predictors: they find a linear truth through noise, follow drift, and are not bent by one outlier."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.policy import Prefilled, Prompt
from kvmesh.scheduling.predictor import Profile, Times
from kvmesh.types import Role, WorkerInfo

TRUTH = (0.03, 2e-4, 1e-8)


def prefill_seconds(computed, cached):
    return TRUTH[0] + TRUTH[1] * computed + TRUTH[2] * ((cached + computed) ** 2 - cached**2)


@given(st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_finds_the_times_of_prompts_and_steps_through_noise(seed):
    chance, times = random.Random(seed), Times.of(Profile())
    for _ in range(300):
        computed, cached = chance.randrange(50, 8000), chance.choice([0, 0, 2000])
        times.prefill.observe(computed, cached, prefill_seconds(computed, cached) * chance.uniform(0.95, 1.05))
        batch = chance.randrange(1, 64)
        context = batch * chance.randrange(100, 3000)
        times.step.observe(context, batch, (0.01 + 1e-6 * context + 3e-4 * batch) * chance.uniform(0.95, 1.05))
    for computed, cached in ((300, 0), (4000, 0), (2000, 4000)):
        assert times.prefill.predict(computed, cached) == pytest.approx(prefill_seconds(computed, cached), rel=0.1)
    assert times.step.predict(20_000, 20) == pytest.approx(0.01 + 0.02 + 0.006, rel=0.1)


def test_follows_a_worker_that_became_slower():
    times, chance = Times.of(Profile(TRUTH, measured=True)), random.Random(0)
    for _ in range(100):
        computed = chance.randrange(100, 5000)
        times.prefill.observe(computed, 0, 2 * prefill_seconds(computed, 0))
    assert times.prefill.predict(1000) == pytest.approx(2 * prefill_seconds(1000, 0), rel=0.05)


def test_an_outlier_moves_a_profile_little():
    times = Times.of(Profile(TRUTH, measured=True))
    times.prefill.observe(1000, 0, 1000.0)
    times.prefill.observe(1000, 0, 1e-9)
    times.prefill.observe(1000, 0, float("nan"))
    assert times.prefill.predict(1000) == pytest.approx(prefill_seconds(1000, 0), rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1e6)), max_size=60))
def test_predictions_never_fall_below_zero_or_with_more_tokens(seen):
    times = Times.of(Profile())
    for computed, cached, seconds in seen:
        times.prefill.observe(computed, cached, seconds)
    predictions = [times.prefill.predict(tokens) for tokens in (0, 1, 100, 10_000, 1_000_000)]
    assert predictions == sorted(predictions)
    assert predictions[0] >= 0


def test_a_worker_never_measured_is_taken_to_be_like_the_others():
    one, other = (WorkerInfo(f"p{i}", 1, Role.PREFILL, "", 1) for i in range(2))
    fleet = Fleet()
    for tokens in range(100, 6000, 40):
        fleet.observe(Prefilled(one, tokens, 0, prefill_seconds(tokens, 0)))
    assert fleet.estimate(other, Prompt(2000)).seconds == pytest.approx(prefill_seconds(2000, 0), rel=0.1)


def test_a_stored_prefix_is_fetched_only_where_that_is_sooner():
    worker = WorkerInfo("p", 1, Role.PREFILL, "", 1)
    prompt = Prompt(4000, stored_tokens=3000)
    fast, slow = (Fleet(usual=Profile(TRUTH, transfer=(0, per_token), measured=True)) for per_token in (1e-5, 1e-2))
    assert fast.estimate(worker, prompt).tokens == 1000
    assert slow.estimate(worker, prompt).tokens == 4000
