"""Groups with phases: every algorithm's plan stands before the judge, and the searches against brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations
from math import inf

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvmesh.errors import InvalidArgument
from kvmesh.planner.algorithms import ARRANGEMENTS, arrange
from kvmesh.planner.algorithms.distserve_high import place as place_instances
from kvmesh.planner.algorithms.kvmesh import CLOSE
from kvmesh.planner.groups import judge
from kvmesh.planner.groups.ceiling import ceiling
from kvmesh.planner.groups.deduction import _nearest, _widest_path, balanced
from kvmesh.planner.groups.instances import Rack, Shape, racks
from kvmesh.planner.groups.robust import regrets, truths
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.timing import Timing, cut
from kvmesh.planner.groups.trial import PipelineLatency, simulated
from kvmesh.planner.groups.waiting import first_tokens, mean_wait, next_tokens, sustained
from kvmesh.planner.task import Task, build
from kvmesh.planner.world import Group, Phase, Plan, Route, Shard, Slo
from tests.unit.planner.tasks import LAYERS, best_by_force, small_tasks, task

SECONDS = 20.0
P, D, M = Phase.PREFILL, Phase.DECODE, Phase.MIXED


def judged(wanted: Task, plan: Plan) -> None:
    """Feasible by the independent check, below its flow, and below the bound."""
    assert plan.expected is not None
    tokens = float(wanted.inputs.mean() + wanted.outputs.mean())
    rate = plan.flow.value / tokens
    assert 0 < plan.expected.goodput <= rate * (1 + 1e-9)
    assert rate <= judge.check(wanted, plan.groups, plan.routes, rate).value * (1 + 1e-6)
    assert plan.flow.value <= plan.bound * (1 + 1e-6)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_every_algorithm_gives_a_plan_that_stands(name: str) -> None:
    wanted = task([("fast", 2), ("fast", 2), ("slow", 1)])
    plan, nodes = arrange(name, wanted, SECONDS)
    judged(wanted, plan)
    assert plan.algorithm == name
    assert set(plan.placement) == set(range(len(nodes.hosts)))
    assert sum(route.share for route in plan.routes) == pytest.approx(1)


@settings(max_examples=5, deadline=None)
@given(small_tasks())
def test_searches_come_near_the_best_partition(wanted: Task) -> None:
    best = best_by_force(wanted)
    assume(best > 0)
    plan, _ = arrange("thunderserve", wanted, SECONDS)
    judged(wanted, plan)
    assert Estimator(wanted).route(plan.groups).value >= best * 0.95
    # Ours takes the plan that it doubts least among those that are close.
    trusted, _ = arrange("kvmesh", wanted, SECONDS)
    judged(wanted, trusted)
    assert Estimator(wanted).route(trusted.groups).value >= best * 0.95 * CLOSE


@pytest.mark.parametrize("name", ["thunderserve", "kvmesh", "splitwise"])
def test_the_same_seed_gives_the_same_plan(name: str) -> None:
    wanted = task([("fast", 2), ("slow", 1)])
    assert arrange(name, wanted, SECONDS, 3)[0].groups == arrange(name, wanted, SECONDS, 3)[0].groups


def test_disaggregation_pays_where_tokens_must_come_fast() -> None:
    # Beside a chunk, a token takes longer than 25 ms.
    wanted = task([("fast", 1), ("fast", 1)], slo=Slo(2.0, 0.026))
    plan, _ = arrange("thunderserve", wanted, SECONDS)
    assert P in {group.phase for group in plan.groups}
    loose, _ = arrange("thunderserve", replace(wanted, slo=Slo(2.0, 1.0)), SECONDS)
    assert P not in {group.phase for group in loose.groups}


def test_slow_links_keep_kv_at_home() -> None:
    wanted = task([("fast", 1), ("fast", 1)], slo=Slo(2.0, 1.0), bytes_per_s=1e5)
    plan, _ = arrange("thunderserve", wanted, SECONDS)
    assert {group.phase for group in plan.groups} == {M}


def test_cost_takes_no_more_hosts_than_the_rate_needs() -> None:
    wanted = task([("fast", 1)] * 4, objective="cost", prices=[1.0, 1.0, 1.0, 1.0])
    few = replace(wanted, workload=replace(wanted.workload, rate=1.0))
    plan, _ = arrange("splitwise", few, SECONDS)
    assert plan.expected is not None
    assert plan.expected.dollars_per_hour < 4
    assert plan.expected.goodput >= 0.9


def test_energy_takes_the_frugal_host() -> None:
    wanted = task([("fast", 1), ("slow", 1)], objective="energy", slo=Slo(5.0, 1.0))
    wanted = replace(wanted, workload=replace(wanted.workload, rate=0.2))
    plan, _ = arrange("splitwise", wanted, SECONDS)
    assert {wanted.hosts[shard.host].accelerator for group in plan.groups for shard in group.shards} == {"fast"}


def test_splitwise_refuses_a_model_larger_than_every_host() -> None:
    wanted = task([("fast", 1)] * 4)
    large = replace(wanted.model, bytes_per_layer=2e9)
    with pytest.raises(InvalidArgument, match="even h0 holds less than 8 layers of small"):
        arrange("splitwise", replace(wanted, model=large), SECONDS)


# The parts -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=4), st.integers(1, 6))
def test_layers_are_balanced(stages: list[tuple[int, int]], layers: int) -> None:
    seconds, limits = [float(cost) for cost, _ in stages], [limit for _, limit in stages]
    counts = balanced(seconds, limits, layers)
    if sum(limits) < layers:
        assert counts == []
        return
    assert sum(counts) == layers
    assert all(count <= limit for count, limit in zip(counts, limits, strict=True))
    slowest = max(count * cost for count, cost in zip(counts, seconds, strict=True))
    assert slowest == min(
        max(c * cost for c, cost in zip(other, seconds, strict=True)) for other in _compositions(limits, layers)
    )


def _compositions(limits: list[int], layers: int) -> list[list[int]]:
    if not limits:
        return [[]] if not layers else []
    first, rest = limits[0], limits[1:]
    return [[k, *tail] for k in range(min(first, layers) + 1) for tail in _compositions(rest, layers - k)]


@given(st.data())
def test_the_widest_path_has_the_widest_slowest_link(data: st.DataObject) -> None:
    hosts = list(range(data.draw(st.integers(2, 5))))
    widths = {(u, v): float(data.draw(st.integers(0, 9))) for u in hosts for v in hosts if u != v}

    def slowest(path: tuple[int, ...]) -> float:
        return min(widths[u, v] for u, v in pairwise(path))

    path = _widest_path(hosts, widths)
    assert sorted(path) == sorted(_nearest(hosts, widths)) == hosts
    assert slowest(path) == max(slowest(order) for order in permutations(hosts))


def test_a_rack_is_packed_without_overlap() -> None:
    wanted = task([("fast", 4), ("fast", 4)])
    (rack,) = racks(wanted)
    shapes = list(rack.shapes())
    assert Shape(1, 1) in shapes
    assert Shape(2, 4) in shapes
    taken = [rack.take(Shape(2, 1), P), rack.take(Shape(1, 3), D), rack.take(Shape(1, 3), D), rack.take(Shape(1, 1), D)]
    used = [(s.host, a) for group in taken if group for s in group.shards for a in s.accelerators]
    assert len(used) == len(set(used)) == 8
    assert rack.take(Shape(1, 1), P) is None
    fresh = Rack(wanted, rack.hosts)
    assert fresh.take(Shape(8, 1), P) is None
    assert fresh.accelerators == 8


@settings(max_examples=20, deadline=None)
@given(small_tasks())
def test_distserve_instances_fill_but_do_not_overfill(wanted: Task) -> None:
    estimator = Estimator(wanted)
    for rack in racks(wanted):
        groups = place_instances(estimator, rack, lambda group, estimate: estimate)
        used = [(s.host, a) for group in groups for s in group.shards for a in s.accelerators]
        assert len(used) == len(set(used)) <= sum(wanted.hosts[host].accelerators for host in rack.hosts)


def single(phase: Phase, host: int = 0) -> Group:
    return Group(phase, (Shard(host, (0,), (0, LAYERS)),))


def test_waiting_is_pollaczek_and_khinchine() -> None:
    timing = Timing(task([("fast", 1)]), single(P))
    service = timing.service
    rate = 0.5 / service.mean()
    assert mean_wait(service, rate) == pytest.approx(rate * (service**2).mean() / 2 / 0.5)
    assert mean_wait(service, 1.01 / service.mean()) == inf
    assert first_tokens(timing, 0.01) > 0.999 > first_tokens(timing, 0.9 / service.mean()) > 0
    assert first_tokens(timing, 1.01 / service.mean()) == 0


def test_tokens_come_in_time_until_the_batch_is_too_large() -> None:
    timing = Timing(task([("fast", 1)], slo=Slo(2.0, 0.025)), single(D))
    most = sustained(timing)
    assert next_tokens(timing, most * 0.9) > 0.94 > next_tokens(timing, most * 1.2)
    batch = float(timing.batch_within(0.025))
    assert timing.tpot(batch) == pytest.approx(0.025)


def test_a_chain_is_as_fast_as_its_slowest_stage() -> None:
    wanted = task([("fast", 1), ("slow", 1)])
    chain = Group(P, (Shard(0, (0,), (0, 6)), Shard(1, (0,), (6, 8))))
    timing, alone = Timing(wanted, chain), Timing(wanted, single(P))
    assert timing.service == pytest.approx(alone.service * 0.75)
    assert timing.first_token.mean() > alone.first_token.mean()


def test_overlapping_spans_share_the_work() -> None:
    wanted = task([("fast", 1)] * 3)
    # Layers 3 to 6 are held twice: the two ends help each other.
    group = Group(P, (Shard(0, (0,), (0, 6)), Shard(1, (0,), (3, 8))))
    assert [span for span, _ in cut(group, LAYERS)] == [(0, 3), (3, 6), (6, 8)]
    assert not cut(Group(P, (Shard(0, (0,), (0, 6)),)), LAYERS)
    alone = Timing(wanted, single(P)).service
    assert Timing(wanted, group).service == pytest.approx(alone / 2, rel=1e-6)


def test_the_estimate_agrees_with_the_simulator() -> None:
    wanted = task([("fast", 1)] * 3, slo=Slo(2.0, 0.03))
    groups = (single(P), single(D, 1), single(D, 2))
    estimator = Estimator(wanted)
    total = estimator.route(groups).total
    assert simulated(estimator, groups, start=total, count=150, tolerance=0.05) == pytest.approx(total, rel=0.25)


def test_a_lone_shard_has_the_latency_of_its_profile() -> None:
    wanted = task([("fast", 1)])
    timing = Timing(wanted, single(M))
    own = wanted.latency(timing.group.shards[0])
    both = PipelineLatency(timing).iteration([(0, 100)], 4, 2000)
    assert both == pytest.approx(own.iteration([(0, 100)], 4, 2000) + timing.delay, abs=1e-3)


def test_routes_respect_capacities_and_links() -> None:
    wanted = task([("fast", 1)] * 3, bytes_per_s=5e7)
    groups = (single(P), single(D, 1), single(M, 2))
    estimator = Estimator(wanted)
    routing = estimator.route(groups)
    for number in range(3):
        busy = sum(rate * estimator.loads(groups, pair).get(number, 0.0) for pair, rate in routing.rates.items())
        assert busy <= 1 + 1e-6
    kv = float(wanted.inputs.mean()) * wanted.kv_bytes(1, (0, LAYERS))
    for pair, rate in routing.rates.items():
        assert pair[0] == pair[1] or rate <= 5e7 / kv * (1 + 1e-6)
    assert estimator.route(groups, rate=0.5).total == pytest.approx(0.5)


@settings(max_examples=15, deadline=None)
@given(small_tasks())
def test_no_partition_beats_the_ceiling(wanted: Task) -> None:
    assert best_by_force(replace(wanted, objective="flow")) <= ceiling(wanted) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("groups", "routes", "fault"),
    [
        (
            (single(P), single(D)),
            (Route(0, 1, 1.0, 1.0),),
            "host h0 gives its shards 200% of the time of",
        ),
        ((single(P), single(D, 1)), (Route(1, 0, 1.0, 1.0),), "joins a group for decode with one for prefill"),
        ((single(P), single(D, 1)), (Route(0, 1, 0.4, 1.0),), "routes have shares that add up to 0.4"),
        ((Group(M, (Shard(0, (0,), (0, 5)),)),), (Route(0, 0, 1.0, 1.0),), "group 0 does not hold layer 5"),
        ((Group(M, (Shard(0, (1,), (0, 8)),)),), (Route(0, 0, 1.0, 1.0),), "host h0 has no accelerator 1"),
        ((single(M),), (Route(0, 0, 1.0, 1.0),), "group 0 is sent"),
    ],
)
def test_the_judge_names_the_fault(groups: tuple[Group, ...], routes: tuple[Route, ...], fault: str) -> None:
    with pytest.raises(InvalidArgument, match=fault):
        judge.check(task([("fast", 1), ("fast", 1)]), groups, routes, 1e3)


def test_errors_of_speed_are_drawn_alike_for_a_kind() -> None:
    wanted = task([("fast", 1), ("fast", 1), ("slow", 1)])
    for truth in truths(wanted, 0.5, 5, 0):
        assert truth.factors[0] == truth.factors[1]
        assert all(1 / 1.5 <= factor <= 2 for factor in truth.factors.values())
    plans = [(single(P), single(D, 1)), (single(M), single(M, 1))]
    regret = regrets(wanted, plans, 0.5)
    assert min(regret.worst[regret.choice], max(regret.worst)) == regret.worst[regret.choice]
    assert all(0 <= worst <= 1 for worst in regret.worst)


@pytest.mark.parametrize("name", ["kvmesh", "thunderserve", "splitwise"])
@pytest.mark.parametrize("watts", [250.0, 700.0])
def test_a_power_budget_is_kept_and_the_rest_is_off(name: str, watts: float) -> None:
    wanted = replace(task([("fast", 1)] * 4), power_budget=watts)
    plan, _ = arrange(name, wanted, 2.0)
    judged(wanted, plan)
    assert plan.expected is not None
    assert plan.expected.watts <= watts * (1 + 1e-6)
    assert not plan.standby
    assert plan.flow.value <= plan.bound


def test_the_judge_refuses_what_draws_too_much() -> None:
    wanted = task([("fast", 1)] * 2)
    plan, _ = arrange("splitwise", wanted, SECONDS)
    rate = plan.flow.value / float(wanted.inputs.mean() + wanted.outputs.mean())
    with pytest.raises(InvalidArgument, match=r"draws \d+ W at least; the power budget is 100 W"):
        judge.check(replace(wanted, power_budget=100.0), plan.groups, plan.routes, rate)


def test_a_power_budget_below_idle_hosts_is_refused() -> None:
    one = task([("fast", 1)] * 2)
    with pytest.raises(InvalidArgument, match="is 40 W, and the hosts of test that hold small draw 45 W at least"):
        build(one.cluster, one.model, one.workload, one.slo, one.speeds, power_budget=40.0)
