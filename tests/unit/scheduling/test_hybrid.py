"""Hybrid: where a prompt is computed follows the objectives; who decodes is not harmed."""

import pytest

from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.hybrid import Hybrid
from kvmesh.scheduling.phases import Phases
from kvmesh.scheduling.policy import Prompt, Slo
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
