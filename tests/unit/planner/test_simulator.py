"""The simulator against closed forms, against itself taken literally, and its own books."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvmesh.planner.latency import Chunk, DistServeLatency, Latency
from kvmesh.planner.simulator import Arrival, Deployment, HandOver, Instance, Links, Outcome, Phase, goodput, simulate
from kvmesh.planner.simulator.knowledge import profiled_fleet
from kvmesh.planner.simulator.network import Network
from kvmesh.planner.simulator.simulation import Simulation
from kvmesh.planner.world import Link
from kvmesh.scheduling.chunked import Chunked
from kvmesh.scheduling.placement import Placement
from kvmesh.scheduling.policy import Policy, Slo

MODEL = DistServeLatency((0.018, 1e-4, 7e-9), (0.02, 6e-7, 4e-5), (0.007, 6e-7, 1.6e-4))


@dataclass(frozen=True, slots=True)
class Constant(Latency):
    """Every iteration takes as long."""

    seconds: float

    def iteration(self, chunks: Sequence[Chunk], decodes: int, context: int) -> float:
        return self.seconds


def poisson(rate: float, requests: int, prompt: int, output: int, seed: int = 0) -> list[Arrival]:
    chance = random.Random(seed)
    times = accumulate(chance.expovariate(rate) for _ in range(requests))
    return [Arrival(at, prompt, output) for at in times]


def mixed(latency: Latency = MODEL, **options: int) -> Deployment:
    return Deployment([Instance("m", Phase.MIXED, latency, **{"kv_tokens": 1 << 16, **options})])  # type: ignore[arg-type]


def split(hand_over: HandOver = HandOver.PULL, **options: float) -> Deployment:
    instances = [Instance("p", Phase.PREFILL, MODEL, 1 << 16), Instance("d", Phase.DECODE, MODEL, 1 << 16)]
    return Deployment(instances, hand_over=hand_over, **options)  # type: ignore[arg-type]


def assert_clean(simulation: Simulation, outcome: Outcome) -> None:
    assert simulation.check_integrity() == []
    assert all(request.finish < inf or request.refused for request in outcome.requests)


def test_one_request_is_the_sum_of_its_iterations() -> None:
    (request,) = simulate(mixed(token_budget=400), [Arrival(5.0, 1000, 20)], Chunked()).requests
    chunks = [(0, 400), (400, 400), (800, 200)]
    first = 5.0 + sum(MODEL.iteration([chunk], 0, 0) for chunk in chunks)
    decodes = sum(MODEL.decode(1, 1000 + step) for step in range(1, 20))
    assert request.first_token == pytest.approx(first)
    assert request.finish == pytest.approx(first + decodes)
    assert request.tpot == pytest.approx(decodes / 19)


def test_mean_wait_is_that_of_an_m_d_1_queue() -> None:
    service, rate = 0.01, 60.0
    deployment = mixed(Constant(service), max_running=1)
    requests = simulate(deployment, poisson(rate, 20_000, 16, 1), Chunked()).requests
    wait = sum(request.ttft - service for request in requests) / len(requests)
    load = rate * service
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def test_littles_law_holds_for_the_sequences_that_decode() -> None:
    """Time in the system summed over requests, and sequences in the system summed over time, are counted apart."""
    outcome = simulate(split(), poisson(20.0, 500, 300, 50), Placement())
    decode = next(usage for usage in outcome.instances if usage.name == "d")
    stays = sum(request.finish - request.first_token for request in outcome.requests)
    # A sequence is admitted after the iteration under way, and joins after the one that began then.
    longest_wait = 500 * 2 * MODEL.decode(60, 60 * 350)
    assert decode.batch_seconds <= stays <= decode.batch_seconds + longest_wait


def test_tokens_are_conserved() -> None:
    arrivals = poisson(15.0, 300, 700, 40)
    simulation = Simulation(split(), Placement(), Slo())
    outcome = simulation.run(arrivals)
    assert_clean(simulation, outcome)
    prompt, decoded = (sum(getattr(u, name) for u in outcome.instances) for name in ("prompt_tokens", "output_tokens"))
    assert prompt == 300 * 700
    assert decoded == 300 * 39


def test_equal_inputs_give_equal_outcomes() -> None:
    runs = [simulate(split(), poisson(25.0, 200, 500, 30, seed=3), Placement()).requests for _ in range(2)]
    assert runs[0] == runs[1]


def test_who_is_shown_to_the_policy_is_drawn_by_the_seed() -> None:
    instances = [Instance(f"m{i}", Phase.MIXED, MODEL, 1 << 14) for i in range(20)]

    def run(seed: int) -> list[str]:
        outcome = simulate(Deployment(instances), poisson(50.0, 100, 200, 5), Chunked(), candidates=2, seed=seed)
        assert all(request.finish < inf for request in outcome.requests)
        return [request.decode for request in outcome.requests]

    assert run(1) == run(1) != run(2)


def test_links_are_looked_up_by_name_then_by_region_then_by_default() -> None:
    a1, a2, b1 = (Instance(name, Phase.MIXED, MODEL, 160, region=name[0]) for name in ("a1", "a2", "b1"))
    links = Links(Link(100.0, 1.0), {("a", "b"): Link(50.0, 2.0), ("a2", "b1"): Link(10.0, 3.0)}, port_bytes_per_s=80.0)
    assert Network(links).transfer(a1, a2, 100.0, earliest=0.0) == pytest.approx(100 / 80 + 1)
    assert Network(links).transfer(a1, b1, 100.0, earliest=0.0) == pytest.approx(100 / 50 + 2)
    assert Network(links).transfer(a2, b1, 100.0, earliest=0.0) == pytest.approx(100 / 10 + 3)


def test_a_router_that_profiled_its_workers_predicts_their_times() -> None:
    times = profiled_fleet(mixed()).times(mixed().instances[0].worker)
    assert times.prefill.predict(700) == pytest.approx(MODEL.prefill([700]), rel=1e-3)
    assert times.step.predict(20_000, 32) == pytest.approx(MODEL.decode(32, 20_000), rel=1e-3)


def test_pull_pays_the_whole_transfer_and_streaming_only_its_last_layer() -> None:
    link = Links(Link(1e9, 0.002))
    options = {"links": link, "kv_bytes_per_token": 1e6, "codec_ratio": 2.0, "layers": 40}
    alone = [Arrival(0.0, 1000, 2)]
    seconds = 1000 * 1e6 / 2 / 1e9
    (pulled,) = simulate(split(HandOver.PULL, **options), alone, Placement()).requests  # type: ignore[arg-type]
    step = MODEL.decode(1, 1001)
    assert pulled.tpot == pytest.approx(seconds + 0.002 + step)
    (streamed,) = simulate(split(HandOver.DIRECT, **options), alone, Placement()).requests  # type: ignore[arg-type]
    began_late = pulled.first_token / 40
    assert streamed.tpot == pytest.approx(max(seconds / 40, began_late + seconds - pulled.first_token) + 0.002 + step)


def test_transfers_of_one_link_wait_for_each_other() -> None:
    options = {"links": Links(Link(1e8, 0.0)), "kv_bytes_per_token": 1e6}
    two = [Arrival(0.0, 500, 2), Arrival(0.0, 500, 2)]
    outcome = simulate(split(**options), two, Placement())  # type: ignore[arg-type]
    first, second = sorted(request.finish for request in outcome.requests)
    assert second - first >= 4.9
    assert outcome.transferred_bytes == 1e9


def test_a_full_decode_instance_leaves_prompts_where_they_are() -> None:
    """Pull: what cannot be admitted keeps its blocks at the prefill instance, which then admits no more."""
    instances = [Instance("p", Phase.PREFILL, MODEL, 1600), Instance("d", Phase.DECODE, MODEL, 1600)]
    simulation = Simulation(Deployment(instances), Placement(), Slo())
    outcome = simulation.run([Arrival(0.0, 1000, 200) for _ in range(6)])
    assert_clean(simulation, outcome)
    assert {usage.peak_blocks for usage in outcome.instances} <= set(range(63, 101))
    assert all(request.finish < inf for request in outcome.requests)


def test_shared_prompts_are_computed_once() -> None:
    arrivals = [Arrival(float(at), 1200, 5, hashes=(1, 2, 100 + at)) for at in range(4)]
    outcome = simulate(split(), arrivals, Placement())
    assert [request.hit_tokens for request in outcome.requests] == [0, 1024, 1024, 1024]


def test_what_can_never_fit_is_refused_with_a_reason() -> None:
    outcome = simulate(mixed(kv_tokens=160), [Arrival(0.0, 500, 5), Arrival(1.0, 50, 5)], Chunked())
    assert "no room in a context of 160" in outcome.requests[0].refused
    assert outcome.attainment(Slo()) == 0.5


shapes = st.tuples(st.floats(0, 2), st.integers(1, 300), st.integers(1, 40), st.lists(st.integers(0, 3), max_size=4))


@settings(deadline=None, max_examples=80)
@given(
    requests=st.lists(shapes, min_size=1, max_size=25),
    shared=st.booleans(),
    kind=st.sampled_from(["mixed", "prefill first", HandOver.PULL, HandOver.DIRECT]),
    kv_tokens=st.integers(24, 200).map(lambda blocks: blocks * 16),
    budget=st.integers(3, 400),
    max_running=st.integers(2, 20),
)
def test_leaping_changes_nothing(
    requests: list[tuple[float, int, int, list[int]]],
    shared: bool,
    kind: str,
    kv_tokens: int,
    budget: int,
    max_running: int,
) -> None:
    """Coarse and literal runs are the same run; with shared prompts to the last preemption."""
    base = Instance("a", Phase.MIXED, MODEL, kv_tokens, budget, max_running, prefill_first=kind == "prefill first")
    pair = [replace(base, phase=Phase.PREFILL), replace(base, name="b", phase=Phase.DECODE)]
    fleet = pair if isinstance(kind, HandOver) else [base, replace(base, name="b")]
    hand_over = kind if isinstance(kind, HandOver) else HandOver.PULL
    deployment = Deployment(fleet, Links(Link(1e8, 1e-3)), 1e4, hand_over=hand_over, layers=4)
    arrivals = [Arrival(at, p, o, _names(p, h) if shared else (), "", 64) for at, p, o, h in sorted(requests)]
    policy: type[Policy] = Placement if isinstance(kind, HandOver) else Chunked
    runs = []
    for literal in (False, True):
        simulation = Simulation(deployment, policy(), Slo(), literal=literal)
        outcome = simulation.run(arrivals)
        assert_clean(simulation, outcome)
        runs.append(outcome)
    coarse, plain = runs
    # Prompts that share nothing have no digests, and find less of themselves again once preempted.
    assume(shared or not any(usage.preemptions for usage in plain.instances))
    for one, other in zip(coarse.requests, plain.requests, strict=True):
        assert one.refused == other.refused
        assert (one.hit_tokens, one.prefill, one.decode) == (other.hit_tokens, other.prefill, other.decode)
        assert one.first_token == pytest.approx(other.first_token, rel=1e-9)
        assert one.finish == pytest.approx(other.finish, rel=1e-9)
    for used, expected in zip(coarse.instances, plain.instances, strict=True):
        assert (used.iterations, used.preemptions) == (expected.iterations, expected.preemptions)
        assert used.prompt_tokens == expected.prompt_tokens


def _names(tokens: int, choices: list[int]) -> tuple[int, ...]:
    """Ids of 64 tokens each, a chain: equal ids stand for equal prompts up to there."""
    ids = [*choices, *[9] * 5][: -(-tokens // 64)]
    return tuple(hash((tokens if (i + 1) * 64 > tokens else 0, *ids[: i + 1])) % (1 << 31) for i in range(len(ids)))


def test_goodput_is_where_attainment_breaks() -> None:
    slo = Slo(ttft=0.2, tpot=0.05)

    def arrivals_at(rate: float) -> list[Arrival]:
        return poisson(rate, 300, 500, 20)

    best = goodput(split, arrivals_at, Placement, slo, tolerance=0.01)
    assert simulate(split(), arrivals_at(best), Placement(), slo=slo).attainment(slo) >= 0.9
    assert simulate(split(), arrivals_at(best * 1.03), Placement(), slo=slo).attainment(slo) < 0.9


def test_no_rate_is_good_where_the_objective_is_out_of_reach() -> None:
    assert goodput(split, lambda rate: poisson(rate, 20, 500, 20), Placement, Slo(ttft=1e-3), tolerance=0.1) == 0.0
