"""The replayed fleet: energy adds up, latencies are those of closed forms, consolidation and caps do their part."""

import random
from itertools import pairwise

import pytest

from kvmesh.planner.power.control import Capping, Consolidating, SimulatedActuator
from kvmesh.planner.power.fleet import replay
from kvmesh.planner.power.instance import TRANSFER_SECONDS, Instance, Request
from kvmesh.planner.power.points import Limits
from kvmesh.planner.power.profile import profile
from kvmesh.planner.world import Phase
from kvmesh.scheduling.power import Level, PowerPolicy, Row, Thresholds

LLAMA, BLOOM = profile("A100-80G/llama2-70b/8"), profile("A100-80G/bloom-176b/8")


def poisson(rate, seconds, prompt=1000, output=150, seed=0):
    generator, time, requests = random.Random(seed), 0.0, []
    while (time := time + generator.expovariate(rate)) < seconds:
        requests.append(Request(time, prompt, output, generator.random() < 0.5))
    return requests


def test_one_request_takes_what_the_profile_says():
    request = Request(0.5, 1024, 101)
    outcome = replay([request], [Instance(LLAMA)])
    assert request.ttft == pytest.approx(LLAMA.prefill_seconds(1024))
    assert request.tpot == pytest.approx(LLAMA.decode_seconds(1))
    busy = LLAMA.prefill_watts(1024) * request.ttft + LLAMA.decode_watts(1) * 100 * request.tpot
    end = outcome.readings[-1].time
    assert outcome.joules == pytest.approx(busy + LLAMA.idle_watts * (end - request.end + request.arrival))


def test_requests_in_one_batch_share_its_steps():
    requests = [Request(0.0, 512, 50) for _ in range(4)]
    replay(requests, [Instance(LLAMA)])
    assert [request.ttft for request in requests] == pytest.approx([LLAMA.prefill_seconds(2048)] * 4)
    assert [request.tpot for request in requests] == pytest.approx([LLAMA.decode_seconds(4)] * 4)


def test_waiting_is_that_of_a_queue():
    """Outputs of one token leave an M/D/1 queue of prompts; batching is off, as two prompts exceed a batch."""
    requests = poisson(2.0, 4000, prompt=1500, output=1)
    replay(requests, [Instance(LLAMA)])
    service = LLAMA.prefill_seconds(1500)
    use = 2.0 * service
    waited = sum(request.ttft for request in requests) / len(requests) - service
    assert waited == pytest.approx(use * service / (2 * (1 - use)), rel=0.1)


def test_readings_add_up_to_the_joules():
    outcome = replay(poisson(3, 60), [Instance(LLAMA) for _ in range(3)])
    assert sum(reading.total * 2.0 for reading in outcome.readings) == pytest.approx(outcome.joules)
    assert all(request.end >= request.first >= request.arrival for request in outcome.requests)


def test_the_same_load_gives_the_same_outcome():
    first, second = (replay(poisson(3, 60), [Instance(LLAMA) for _ in range(3)]).joules for _ in range(2))
    assert first == second


def test_kv_goes_over_to_an_instance_that_decodes():
    prefill, decode = Instance(LLAMA, phase=Phase.PREFILL), Instance(LLAMA, phase=Phase.DECODE)
    request = Request(0.5, 1024, 101)
    outcome = replay([request], [decode, prefill])
    assert request.ttft == pytest.approx(LLAMA.prefill_seconds(1024))
    assert request.end == pytest.approx(request.first + TRANSFER_SECONDS + 100 * LLAMA.decode_seconds(1))
    assert prefill.pending == decode.pending == 0
    assert sum(reading.total * 2.0 for reading in outcome.readings) == pytest.approx(outcome.joules)


def test_prompts_do_not_disturb_tokens_elsewhere():
    mixed = replay(poisson(3, 300), [Instance(LLAMA) for _ in range(3)])
    phases = [Phase.PREFILL, Phase.DECODE, Phase.DECODE]
    split = replay(poisson(3, 300), [Instance(LLAMA, phase=each) for each in phases])
    slowest = [max(request.tpot for request in outcome.requests) for outcome in (mixed, split)]
    assert slowest[1] < slowest[0]
    assert slowest[1] <= LLAMA.decode_seconds(64) + TRANSFER_SECONDS


def test_consolidation_saves_energy_and_keeps_the_slo():
    always = replay(poisson(3, 900), [Instance(LLAMA) for _ in range(10)])
    fewer = replay(
        poisson(3, 900), [Instance(LLAMA) for _ in range(10)], Consolidating(LLAMA, 1000, 150, Limits(1.0, 0.07))
    )
    assert fewer.joules_per_token < 0.7 * always.joules_per_token
    assert fewer.attainment(1.0, 0.1) > always.attainment(1.0, 0.1) - 0.01
    assert all(request.end == request.end for request in fewer.requests)


def test_phases_of_their_own_save_more():
    limits = Limits(0.45, 0.07)
    together, apart = (
        replay(
            poisson(6, 900), [Instance(LLAMA) for _ in range(12)], Consolidating(LLAMA, 1000, 150, limits, split=split)
        )
        for split in (False, True)
    )
    assert apart.joules_per_token < together.joules_per_token
    assert apart.attainment(1.0, 0.1) > 0.98
    assert all(request.end > request.first for request in apart.requests)


def test_an_instance_that_wakes_takes_its_time():
    controller = Consolidating(LLAMA, 1000, 150, Limits(1.0, 0.07), period=20, start_seconds=30)
    calm, busy = poisson(0.5, 100), [Request(100 + r.arrival, r.prompt, r.output) for r in poisson(8, 100)]
    outcome = replay(calm + busy, [Instance(LLAMA) for _ in range(10)], controller)
    on = {reading.time: reading.on for reading in outcome.readings}
    assert on[98.0] == on[120.0] == on[140.0] == 1  # Wanted at 120, awake at 150.
    assert on[154.0] > 3


@pytest.fixture(scope="module")
def row():
    """Thirty per cent more servers than the budget holds; half of them with low priority; caps take two seconds."""
    fleet = [Instance(BLOOM, low_priority=number % 2 == 0) for number in range(26)]
    actuator = SimulatedActuator(fleet, delay=2.0)
    low = frozenset(str(number) for number in range(0, 26, 2))
    capping = Capping(Row(PowerPolicy(20 * BLOOM.provisioned_watts), actuator, low), actuator)
    requests = poisson(16, 600, prompt=1200, output=200)
    return replay(requests, fleet, capping), capping.levels, 20 * BLOOM.provisioned_watts


def test_power_stays_above_the_second_threshold_only_while_caps_take_effect(row):
    outcome, levels, budget = row
    thresholds = Thresholds()
    over = 0.0
    for reading, level in zip(outcome.readings, levels, strict=True):
        over = over + 2.0 if reading.total > thresholds.second * budget and level < Level.ALL else 0.0
        assert over <= thresholds.settle + 4.0
    assert max(reading.total for reading in outcome.readings) < budget
    assert Level.BRAKE not in levels
    assert Level.LOW_HARD in levels


def test_caps_do_not_oscillate(row):
    """Between two rises the power must have been calm for the holding time: no more than two changes in it."""
    _, levels, _ = row
    changes = [index for index in range(1, len(levels)) if levels[index] != levels[index - 1]]
    falls = [index for index in changes if levels[index] < levels[index - 1]]
    assert all(later - earlier >= 15 for earlier, later in pairwise(falls))


def test_high_priority_suffers_less(row):
    outcome, _, _ = row
    means = [
        sum(r.tpot for r in chosen) / len(chosen)
        for low in (False, True)
        for chosen in [[r for r in outcome.requests if r.low_priority == low]]
    ]
    assert means[0] <= means[1]
