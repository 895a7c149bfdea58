"""Phases of all groups at once, pools and their parts, groups on standby, and routes that keep their shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.planner.groups.outcome import goodput, settle
from kvmesh.planner.groups.phases import phased
from kvmesh.planner.groups.pools import parted, pooled, united_by
from kvmesh.planner.groups.robust import cautious, compared, kept, rebalanced, truths
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.observed_file import ObservedSection, applied
from kvmesh.planner.replan import replan
from kvmesh.planner.world import Group, Phase, Shard, Slo
from tests.unit.planner.tasks import LAYERS, task

P, D, M = Phase.PREFILL, Phase.DECODE, Phase.MIXED


def whole(phase: Phase, host: int) -> Group:
    return Group(phase, (Shard(host, (0,), (0, LAYERS)),))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["fast", "slow"]), min_size=1, max_size=4), st.sampled_from([0.026, 0.05, 1.0]))
def test_the_program_finds_the_best_phases(kinds: list[str], tpot: float) -> None:
    wanted = task([(kind, 1) for kind in kinds], slo=Slo(2.0, tpot))
    groups = [whole(D, host) for host in range(len(kinds))]
    estimator = Estimator(wanted)
    best = max(
        estimator.route([replace(g, phase=phase) for g, phase in zip(groups, phases, strict=True)]).value
        for phases in product(Phase, repeat=len(groups))
    )
    assert estimator.route(phased(estimator, groups, inf)).value == pytest.approx(best, rel=1e-5)


def test_nobody_flips_when_nothing_is_found() -> None:
    wanted = task([("fast", 1)], slo=Slo(2.0, 1.0))
    assert phased(Estimator(wanted), [], inf) == ()
    hopeless = replace(wanted, slo=Slo(1e-6, 1e-6))
    assert phased(Estimator(hopeless), [whole(D, 0)], inf) == (whole(D, 0),)


def test_a_pool_serves_more_than_its_parts() -> None:
    wanted = task([("fast", 1)] * 4, slo=Slo(0.3, 0.05))
    estimator = Estimator(wanted)
    alone = estimator.rate(whole(P, 0))
    (pool,) = united_by(lambda group: group.phase, [whole(P, host) for host in range(4)])
    assert estimator.rate(pool) > 4 * alone
    assert set(parted(wanted, [pool])) == {whole(P, host) for host in range(4)}


def test_pools_hold_the_weights_that_were_there() -> None:
    wanted = task([("fast", 1)] * 3 + [("slow", 1)] * 2)
    groups = [whole(M, host) for host in range(3)] + [Group(M, (Shard(3, (0,), (0, 4)), Shard(4, (0,), (4, 8))))]
    shards = {shard for group in groups for shard in group.shards}
    for trial in pooled(Estimator(wanted), groups, lambda: True):
        assert {shard for group in trial for shard in group.shards} == shards
        assert sum(len(group.shards) for group in trial) == len(shards)
    assert parted(wanted, groups[3:]) == tuple(groups[3:])
    helped = Group(M, (*whole(M, 0).shards, Shard(3, (0,), (0, 4))))
    assert parted(wanted, [helped]) == (helped,)


def test_groups_without_work_stand_by_until_the_world_changes() -> None:
    wanted = task([("fast", 1)] * 3, slo=Slo(2.0, 0.03))
    estimator = Estimator(wanted)
    groups = (whole(P, 0), whole(D, 1), whole(P, 2))
    routing = estimator.route(groups)
    used = {number for number in range(3) if routing.through(number)}
    plan, _ = settle("test", estimator, groups, 0.0, routing)
    assert plan.groups == tuple(groups[number] for number in sorted(used))
    assert plan.standby == tuple(group for number, group in enumerate(groups) if number not in used)
    assert plan.expected is not None
    assert goodput(estimator, groups, routing) == pytest.approx(plan.expected.goodput)
    frugal = Estimator(replace(wanted, objective="energy"))
    assert settle("test", frugal, groups, 0.0, routing)[0].standby == ()


def test_a_group_on_standby_is_woken() -> None:
    wanted = task([("fast", 1)] * 3, slo=Slo(2.0, 0.03))
    longer = applied(wanted, ObservedSection(input_tokens=1400, output_tokens=8))
    active, standby = (whole(P, 0), whole(D, 1)), (whole(D, 2),)
    without = replan(longer, active, deadline=60.0)
    found = replan(longer, active, deadline=60.0, standby=standby)
    assert found.before == without.before
    assert found.value > without.value
    assert [flip.before for flip in found.flips if flip.shard.host == 2] == [None]


def worst(estimators: Sequence[Estimator], groups: tuple[Group, ...]) -> tuple[float, float]:
    """What nominal and cautious shares lose at most, against routes that follow."""
    shares = [estimators[0].route(groups), cautious(estimators, groups)]
    rows = [[e.route(groups).value, *(kept(e, groups, routing) for routing in shares)] for e in estimators]
    _, nominal, careful = compared(rows).worst
    return nominal, careful


def test_cautious_shares_lose_less_in_the_worst_truth() -> None:
    wanted = task([("fast", 1), ("slow", 1), ("slow", 1)], slo=Slo(5.0, 1.0))
    estimators = [Estimator(wanted), *map(Estimator, truths(wanted, 0.5, 8, 0))]
    nominal, careful = worst(estimators, tuple(whole(M, host) for host in range(3)))
    assert 0 < careful < nominal < 1


def test_kept_shares_serve_what_they_promised_where_nothing_is_off() -> None:
    wanted = task([("fast", 1), ("fast", 1), ("slow", 1)], slo=Slo(2.0, 0.03))
    estimator, groups = Estimator(wanted), (whole(P, 0), whole(D, 1), whole(M, 2))
    routing = estimator.route(groups)
    assert kept(estimator, groups, routing) == pytest.approx(routing.value, rel=1e-6)


def test_a_router_that_follows_measured_loads_comes_near_the_program() -> None:
    wanted = task([("fast", 1), ("fast", 1), ("slow", 1), ("slow", 1)], slo=Slo(5.0, 1.0))
    groups = tuple(whole(M, host) for host in range(4))
    routing = Estimator(wanted).route(groups)
    for truth in truths(wanted, 0.5, 5, 0):
        estimator = Estimator(truth)
        adapted = kept(estimator, groups, rebalanced(estimator, groups, routing))
        assert kept(estimator, groups, routing) <= adapted + 1e-9
        assert 0.97 * estimator.route(groups).value <= adapted <= estimator.route(groups).value * (1 + 1e-6)
