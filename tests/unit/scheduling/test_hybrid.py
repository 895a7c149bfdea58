"""Hybrid: where a prompt is computed follows the objectives; who decodes is not harmed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.hybrid import Hybrid
from kvmesh.scheduling.phases import Phases
from kvmesh.scheduling.policy import Decoded, Prompt, Slo
from kvmesh.scheduling.predictor import Profile
from kvmesh.types import Role, WorkerCapacity, WorkerInfo

PREFILL = WorkerInfo("p", 1, Role.PREFILL, "", 1)
DECODE = WorkerInfo("d", 1, Role.DECODE, "", 1, capacity=WorkerCapacity(blocks=1000))
PROFILE = Profile((0.0, 1e-3, 0.0), (0.01, 0.0, 1e-3), measured=True)
LOOSE, TIGHT = Slo(1.0, 1.0), Slo(1.0, 0.02)


def hybrid(**fleet):
    return Hybrid(Fleet(usual=PROFILE, mean_output=100.0, **fleet))


def serve(policy, workers, tokens, slo, now=0.0):
    prompt = Prompt(tokens, key=object(), slo=slo)
    prefill = policy.prefill(workers, prompt, now)
    return prefill, policy.decode(workers, tokens, 1, now, prompt=prompt, local=prefill is None)


def test_an_idle_prefill_worker_is_used_and_a_queue_makes_the_decode_worker_compute():
    policy = hybrid()
    prefill, _ = serve(policy, [PREFILL, DECODE], 500, LOOSE)
    assert prefill.worker is PREFILL
    prefill, decode = serve(policy, [PREFILL, DECODE], 500, LOOSE)
    assert prefill is None
    assert decode.prompt_tokens == 500


def test_nobody_who_decodes_is_harmed():
    policy = hybrid()
    serve(policy, [PREFILL, DECODE], 500, TIGHT)
    for _ in range(3):  # Each prompt takes 500 ms, and 50 tokens at 9 ms of slack do not make up for that.
        prefill, _ = serve(policy, [PREFILL, DECODE], 500, TIGHT)
        assert prefill.worker is PREFILL


def test_a_short_prompt_fits_into_the_slack():
    policy = hybrid()
    serve(policy, [PREFILL, DECODE], 900, TIGHT)
    prefill, decode = serve(policy, [PREFILL, DECODE], 60, TIGHT)
    assert prefill is None
    assert decode.worker is DECODE


def test_without_a_prefill_worker_it_is_colocation():
    prefill, decode = serve(hybrid(), [DECODE], 500, TIGHT)
    assert prefill is None
    assert decode.worker is DECODE


def test_a_mixed_prefill_worker_decodes_once_the_others_cannot_keep_the_objective():
    one, other = (WorkerInfo(f"m{i}", 1, Role.MIXED, "", 1, capacity=WorkerCapacity(blocks=1000)) for i in range(2))
    policy = hybrid(phases=Phases({"m0": Role.PREFILL, "m1": Role.DECODE}))
    chosen = [policy.decode([one, other], 10, 1, 0.0, prompt=Prompt(10, slo=TIGHT)).worker for _ in range(12)]
    assert chosen[:10] == [other] * 10  # 10 ms and 1 ms a sequence: 20 ms.
    assert chosen[10] is one


def test_a_full_decode_worker_computes_nothing():
    policy = hybrid()
    policy.decode([DECODE], 15_900, 1, 0.0, prompt=Prompt(15_900, slo=LOOSE))
    for _ in range(3):
        prefill, _ = serve(policy, [PREFILL, DECODE], 500, LOOSE)
        assert prefill.worker is PREFILL


@pytest.mark.parametrize("slo", [Slo(), LOOSE, TIGHT])
def test_the_choice_at_decode_is_the_one_that_was_compared(slo):
    pair = [DECODE, WorkerInfo("e", 1, Role.DECODE, "", 1, capacity=WorkerCapacity(blocks=1000))]
    policy = hybrid()
    chosen = [serve(policy, [PREFILL, *pair], 300, slo) for _ in range(8)]
    local = [decode for prefill, decode in chosen if prefill is None]
    assert all(decode.prompt_tokens for decode in local)
    assert policy.check_integrity() == []


def test_of_equals_the_one_with_more_room_is_chosen():
    small = WorkerInfo("small", 1, Role.DECODE, "", 1, capacity=WorkerCapacity(blocks=100))
    policy = hybrid()
    for worker in (DECODE, small):
        policy.decode([worker], 400, 1, 0.0, prompt=Prompt(400, slo=LOOSE))
    _, decode = serve(policy, [small, DECODE], 100, LOOSE)
    assert decode.worker is DECODE


def test_who_finds_no_room_waits_where_it_comes_first():
    crowded, full = (WorkerInfo(name, 1, Role.DECODE, "", 1, capacity=WorkerCapacity(blocks=10)) for name in "cf")
    policy = hybrid()
    for worker, tokens in ((crowded, 120), (full, 160)):
        policy.decode([worker], tokens, 1, 0.0, prompt=Prompt(tokens, slo=LOOSE))
    _, decode = serve(policy, [full, crowded], 100, LOOSE)
    assert decode.worker is crowded


running = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 400), st.floats(0.012, 0.2)), max_size=30)


@given(running, st.lists(st.integers(1, 900), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_while_there_is_a_prefill_worker_no_prompt_breaks_what_others_may_expect(decodes, prompts):
    """By the books: a usual request's steps and all prompts beside it still fit its objective."""
    workers = [WorkerInfo(f"d{i}", 1, Role.DECODE, "", 1, capacity=WorkerCapacity(blocks=1000)) for i in range(3)]
    policy = hybrid()
    for where, tokens, tpot in decodes:
        policy.decode([workers[where]], tokens, 1, 0.0, prompt=Prompt(tokens, slo=Slo(1.0, tpot)))
    for tokens in prompts:
        before = {worker.worker_id: _steps(policy, worker) for worker in workers}
        prefill, decode = serve(policy, [PREFILL, *workers], tokens, LOOSE)
        if prefill is None:
            step, usual = before[decode.worker.worker_id], policy.caution * policy.fleet.mean_output
            others = [one for one in decode.load.assignments.values() if one.decoding_since is not None]
            lost = [one for one in others if step > one.slo_tpot]
            kept = [one for one in others if one not in lost]
            assert all(step * usual + one.disturbance <= one.slo_tpot * usual for one in kept)


def _steps(policy, worker):
    load = policy.fleet.load(worker)
    return policy.fleet.times(worker).step.predict(load.context_tokens, load.sequences)


@given(st.integers(2, 400), st.floats(0.0, 5.0), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_prompts_beside_a_decode_are_not_taken_for_slow_steps(tokens, disturbed, batch):
    """A step of 10 ms and 1 ms a sequence stays one, however much time prompts took from those who decoded."""
    fleet = hybrid().fleet
    step = 0.01 + 1e-3 * batch
    disturbed = min(disturbed, 2 * step * tokens)
    for _ in range(20):
        fleet.observe(Decoded(DECODE, tokens, step + disturbed / tokens, batch, 100.0 * batch, disturbed))
    assert fleet.times(DECODE).step.predict(100.0 * batch, batch) == pytest.approx(step)


def test_only_prompts_that_were_computed_count_as_time_lost():
    policy = hybrid()
    _, running = serve(policy, [DECODE], 100, LOOSE)
    running.first_token(0.1)
    _, beside = serve(policy, [DECODE], 200, LOOSE, now=0.1)
    assert running.disturbed == pytest.approx(0.0)
    beside.first_token(0.4)
    assert running.disturbed == pytest.approx(0.2)
    serve(policy, [DECODE], 300, LOOSE, now=0.4)
    assert running.disturbed == pytest.approx(0.2)
