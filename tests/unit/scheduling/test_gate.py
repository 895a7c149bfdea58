"""Early rejection: monotone in load, by the load to come, and never of what nobody has measured."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.gate import CurrentLoad, Late, Open, PredictedLoad, decode_load, overtakers
from kvmesh.scheduling.policy import Prompt, Slo
from kvmesh.scheduling.predictor import Profile
from kvmesh.types import Role, WorkerInfo

PREFILL, DECODE = WorkerInfo("p", 1, Role.PREFILL, "", 1), WorkerInfo("d", 1, Role.DECODE, "", 1)
POOL = [PREFILL, DECODE]
PROFILE = Profile((0.0, 1e-3, 0.0), (0.01, 0.0, 1e-3), measured=True)
"""A millisecond for each token of a prompt; 10 ms a step, and one more for each sequence."""
SLO = Slo(ttft=2.0, tpot=0.03)


def fleet(**fields):
    return Fleet(usual=PROFILE, **fields)


def queue(one, tokens, now=0.0):
    return one.charge_prefill(PREFILL, Prompt(tokens), now, tokens, tokens * 1e-3)


def prompt(tokens=500, slo=SLO):
    return Prompt(tokens, slo=slo)


@pytest.mark.parametrize("gate", [Late(), CurrentLoad(), PredictedLoad()])
@given(st.lists(st.integers(1, 1500), max_size=12), st.integers(0, 60))
def test_more_load_never_opens_a_gate(gate, queued, decoding):
    one = fleet(mean_decode_seconds=1e9)
    refused = False
    for step in range(max(len(queued), decoding) + 1):
        now_refused = gate.check(one, POOL, prompt(), 0.0, False) is not None
        assert now_refused or not refused
        refused = now_refused
        if step < len(queued):
            queue(one, queued[step])
        if step < decoding:
            one.charge_decode(DECODE, 100, 1, 0.0, prompt())


def test_the_prefill_queue_refuses_what_would_come_too_late():
    one, gate = fleet(), PredictedLoad()
    queue(one, 1400)
    assert gate.check(one, POOL, prompt(), 0.0, False) is None
    queue(one, 700)
    refused = gate.check(one, POOL, prompt(), 0.0, False)
    assert refused.why == "the first token would come after 2.6 s, the objective is 2 s"
    assert 0.1 <= refused.retry_after <= 60
    assert gate.check(one, POOL, prompt(), 0.9, False) is None  # By then part of it is computed.


def test_the_present_is_not_the_future():
    """Decodes that will have ended do not count, prompts that will decode do: what the current-load gate gets wrong."""
    one = fleet(mean_decode_seconds=1.0)
    for _ in range(30):
        one.charge_decode(DECODE, 100, 1, 0.0, prompt())
    queue(one, 1800)
    assert CurrentLoad().check(one, POOL, prompt(100), 0.0, False) is not None
    assert PredictedLoad().check(one, POOL, prompt(100), 0.0, False) is None
    other = fleet(mean_decode_seconds=10.0)
    for _ in range(30):
        queue(other, 40)
    assert CurrentLoad().check(other, POOL, prompt(), 0.0, False) is None
    assert PredictedLoad().check(other, POOL, prompt(), 0.0, False) is not None


def test_decode_load_counts_each_request_once():
    one = fleet(mean_decode_seconds=5.0)
    one.charge_decode(DECODE, 100, 1, 0.0, prompt())
    queue(one, 1000)
    for moment, sequences in ((0.0, 1), (0.9, 1), (1.0, 2), (4.9, 2), (5.1, 1), (6.1, 0)):
        assert decode_load(one, POOL, 0.0, moment).sequences == sequences


def test_a_long_prompt_counts_on_those_that_will_overtake_it():
    one = fleet(mean_decode_seconds=1.0)
    for _ in range(30):
        one.charge_decode(DECODE, 100, 1, 0.0, prompt())
    assert overtakers(one, POOL, 0.0, 0.5).sequences == 15
    assert overtakers(one, POOL, 0.0, 5.0).sequences == 30
    assert PredictedLoad().check(one, POOL, prompt(1900), 0.0, False) is not None


def test_after_the_prompt_only_the_decode_pool_can_refuse():
    one = fleet()
    queue(one, 10_000)
    assert Late().check(one, POOL, prompt(), 0.0, True) is None
    for _ in range(30):
        one.charge_decode(DECODE, 100, 1, 0.0, prompt())
    assert "a token would take" in Late().check(one, POOL, prompt(), 0.0, True).why


def test_without_objectives_or_measurements_everyone_comes_in():
    crowded = fleet()
    for _ in range(100):
        queue(crowded, 1000)
        crowded.charge_decode(DECODE, 100, 1, 0.0, prompt())
    assert PredictedLoad().check(crowded, POOL, prompt(slo=Slo()), 0.0, False) is None
    assert Open().check(crowded, POOL, prompt(), 0.0, False) is None
    unknown = Fleet()
    for _ in range(100):
        queue(unknown, 1000)
    assert PredictedLoad().check(unknown, POOL, prompt(), 0.0, False) is None
    assert PredictedLoad().check(fleet(), [], prompt(slo=Slo(inf, 0.001)), 0.0, False) is None
