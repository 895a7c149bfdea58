"""Placement: prefixes, queues, measured rates and failures decide; counters return to zero."""

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.scheduling.placement import Placement, uncached_cost
from kvmesh.scheduling.policy import Prompt, identity
from kvmesh.scheduling.prefix_index import prefix_hashes
from kvmesh.types import Role, WorkerInfo


def workers(role, count):
    return [WorkerInfo(f"{role}-{i}", 1, role, f"h:{i}", 1) for i in range(count)]


def prompt_of(tokens, stored=0):
    return Prompt(len(tokens), prefix_hashes(tokens), stored)


def test_equal_workers_take_turns():
    placement, pool = Placement(), workers(Role.PREFILL, 3)
    chosen = []
    for start in range(6):
        assignment = placement.prefill(pool, prompt_of(range(start * 1000, start * 1000 + 64)), 0.0)
        chosen.append(assignment.worker.worker_id)
        assignment.finish(1.0)
    assert chosen == ["prefill-0", "prefill-1", "prefill-2"] * 2


def test_a_known_prefix_attracts_and_a_long_queue_repels():
    placement, pool = Placement(), workers(Role.PREFILL, 2)
    prompt = prompt_of(range(320))
    first = placement.prefill(pool, prompt, 0.0)
    first.first_token(1.0)
    first.finish(1.0)
    again = placement.prefill(pool, prompt, 0.0)
    assert again.worker == first.worker
    assert again.hit_tokens == 319
    for start in range(1, 5):
        placement.prefill([first.worker], prompt_of(range(start * 1000, start * 1000 + 320)), 0.0)
    assert placement.prefill(pool, prompt, 0.0).worker != first.worker


def test_measured_rates_scale_the_queue():
    placement, pool = Placement(), workers(Role.PREFILL, 2)
    for rate, worker in zip((1000.0, 100.0), pool, strict=True):
        placement.prefill([worker], Prompt(10), 0.0).finish(1.0, rate)
    taken = [placement.prefill(pool, Prompt(100), 0.0).worker.worker_id for _ in range(11)]
    assert taken.count("prefill-0") == 10


def test_first_token_frees_the_prefill_queue_but_not_the_decode_context():
    placement = Placement()
    prefill = placement.prefill(workers(Role.PREFILL, 1), Prompt(100), 0.0)
    decode = placement.decode(workers(Role.DECODE, 1), 100, 2, 0.0)
    prefill.first_token(1.0)
    decode.first_token(1.0)
    assert (prefill.load.prompt_tokens, prefill.load.sequences) == (0, 1)
    assert (decode.load.context_tokens, decode.load.sequences) == (100, 2)


def test_decode_goes_where_there_is_least_context_for_the_speed():
    placement, pool = Placement(), workers(Role.DECODE, 2)
    placement.decode([pool[0]], 4000, 1, 0.0)
    assert placement.decode(pool, 10, 1, 0.0).worker == pool[1]
    placement.decode([pool[1]], 8000, 1, 0.0)
    assert placement.decode(pool, 10, 1, 0.0).worker == pool[0]


def test_suspects_are_avoided_for_a_while_and_failed_ones_are_the_last_resort():
    placement, pool = Placement(), workers(Role.DECODE, 3)
    placement.suspect(pool[0], now=0.0)
    avoid = {identity(pool[1])}
    assert placement.decode(pool, 1, 1, 1.0, avoid).worker == pool[2]
    assert placement.decode(pool[:2], 1, 1, 1.0, avoid).worker == pool[0]
    assert placement.decode(pool[1:2], 1, 1, 1.0, avoid).worker == pool[1]
    placement.decode([pool[0]], 1, 1, 1.0).finish(1.0)
    assert placement.decode(pool[:1], 1, 1, 99.0).worker == pool[0]
    assert placement.decode([], 1, 1, 1.0) is None


def test_stored_tokens_are_cheaper_than_computed_ones_and_the_last_is_always_computed():
    assert uncached_cost(Prompt(100), 0) == 100
    assert uncached_cost(Prompt(100), 400) == 1
    assert 10 < uncached_cost(Prompt(100, stored_tokens=100), 0) < 12
    assert uncached_cost(Prompt(100, stored_tokens=50), 60) == 40


def test_a_worker_that_is_gone_is_forgotten_once_its_assignments_are():
    placement, pool = Placement(), workers(Role.PREFILL, 1)
    assignment = placement.prefill(pool, prompt_of(range(64)), 0.0)
    placement.retain([])
    assert placement.assigned == 1
    assignment.finish(1.0)
    placement.retain([])
    assert (placement.assigned, len(placement.fleet.prefixes)) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 500)), max_size=80))
def test_counters_return_to_zero(steps):
    placement, out = Placement(), []
    pools = workers(Role.PREFILL, 3), workers(Role.DECODE, 3)
    for action, pick, tokens in steps:
        if action == 0:
            out.append(placement.prefill(pools[0], prompt_of(range(tokens)), 0.0))
        elif action == 1:
            out.append(placement.decode(pools[1], tokens, 1 + pick, 0.0))
        elif out and action == 2:
            out[pick % len(out)].first_token(1.0)
        elif out:
            out[pick % len(out)].finish(1.0, float(tokens))
        assert placement.check_integrity() == []
    for assignment in out:
        assignment.finish(1.0)
    assert placement.assigned == 0
    assert placement.check_integrity() == []
