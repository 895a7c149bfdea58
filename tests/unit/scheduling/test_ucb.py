"""Exploration: every arm is tried, the best one wins, drift is noticed, constraints hold, rewards may come late."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.policy import Ended, Prompt, Served, Slo
from kvmesh.scheduling.predictor import Profile
from kvmesh.scheduling.prefix_aware import PrefixAware
from kvmesh.scheduling.ucb import Arms, Exploring
from kvmesh.types import Role, WorkerInfo

SLO = Slo(1.0, 0.1)
POOL = [WorkerInfo(f"p{i}", 1, Role.PREFILL, "", 1) for i in range(4)]


def serve(policy, number, ttft_of, slo=SLO):
    """One request, served at once; who computed its prompt."""
    prompt = Prompt(100, key=number, slo=slo)
    assignment = policy.prefill(POOL, prompt, float(number))
    assignment.finish(number + 0.5)
    worker = assignment.worker
    policy.observe(Served(prompt, worker, worker, ttft_of(worker), 0.01, 10))
    return worker.worker_id


@given(st.integers(0, 3), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_tries_everyone_then_stays_with_the_best(best, seed):
    chance, policy = random.Random(seed), Exploring(PrefixAware())
    ttft = lambda worker: (0.1 if worker is POOL[best] else 0.6) * chance.uniform(0.8, 1.2)  # noqa: E731
    chosen = [serve(policy, number, ttft) for number in range(400)]
    assert set(chosen[:4]) == {worker.worker_id for worker in POOL}
    assert chosen[200:].count(f"p{best}") > 150


def test_notices_when_the_best_becomes_the_worst():
    policy = Exploring(PrefixAware(), Arms(window=100))
    before = [serve(policy, number, lambda w: 0.1 if w is POOL[0] else 0.5) for number in range(300)]
    after = [serve(policy, number + 300, lambda w: 0.9 if w is POOL[0] else 0.5) for number in range(300)]
    assert before[100:].count("p0") > 150
    assert after[150:].count("p0") < 30


def test_choices_count_before_their_rewards_come():
    policy = Exploring(PrefixAware())
    chosen = [policy.prefill(POOL, Prompt(100, key=number), 0.0).worker.worker_id for number in range(8)]
    assert sorted(chosen) == sorted([worker.worker_id for worker in POOL] * 2)


def test_only_workers_that_keep_the_objective_are_arms():
    policy = Exploring(PrefixAware(Fleet(usual=Profile((0.0, 1e-3, 0.0), measured=True))))
    for worker in POOL[:3]:
        policy.inner.fleet.charge_prefill(worker, Prompt(5000), 0.0, 5000, 5.0)
    assert {serve(policy, 0, lambda _: 0.1) for _ in range(4)} == {"p3"}


def test_energy_is_part_of_the_reward():
    policy = Exploring(PrefixAware(), expense={"p0": 0.0, "p1": 0.5, "p2": 0.5, "p3": 0.5})
    chosen = [serve(policy, number, lambda _: 0.2) for number in range(300)]
    assert chosen[100:].count("p0") > 150


def test_nothing_is_left_of_requests_that_end_unrewarded():
    policy = Exploring(PrefixAware())
    prompt = Prompt(100, key="a", slo=SLO)
    policy.prefill(POOL, prompt, 0.0).finish(0.1)
    policy.prefill(POOL, prompt, 0.2).finish(0.3)  # Tried again elsewhere.
    policy.observe(Ended(prompt))
    assert policy._pulled == {}
    assert sum(policy.arms._open.values()) == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(-1, 1)), max_size=60), st.integers(1, 10))
def test_means_are_those_of_the_window(rewards, window):
    arms = Arms(window=window)
    names = [(0, (f"w{i}", 1)) for i in range(3)]
    for pick, value in rewards:
        arms.pull(names[pick])
        arms.reward(names[pick], value)
    recent = rewards[-window:]
    for i, arm in enumerate(names):
        values = [value for pick, value in recent if pick == i]
        assert abs(arms.mean(arm) - (sum(values) / len(values) if values else 0)) < 1e-6
        assert arms.tried(arm) == len(values)
