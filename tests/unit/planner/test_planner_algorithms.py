"""Each algorithm against brute force on small clusters, and against the published placements on Helix's own."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings

from kvmesh.errors import InvalidArgument
from kvmesh.planner import compact
from kvmesh.planner.algorithms import ALGORITHMS, place
from kvmesh.planner.bound import upper_bound
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.helix_files import read_placement
from kvmesh.planner.regions import divide
from kvmesh.planner.stages import Region, patterns, pipeline
from kvmesh.planner.world import SINK, SOURCE, Problem, Span
from tests.unit.planner.problems import AMPLE, SHARED, best_flow, make, mesh, needs_shared, placements, problems
from tests.unit.planner.test_planner_evaluator import SETUPS, helix_problem

NEARLY = 2e-3
"""Below this gap helix stops looking."""


def test_single24_is_proven_optimal() -> None:
    plan = place("helix", helix_problem("single24"))
    assert plan.flow.value >= 2045
    assert plan.gap < 1e-5


def test_geo24_beats_the_published_placement() -> None:
    task = helix_problem("geo24")
    assert len(divide(task, 2045.0).regions) == 3
    plan = place("helix", task, time_limit=20)
    assert plan.flow.value >= 1754
    assert plan.flow.value <= plan.bound


def test_het42_beats_the_published_placement() -> None:
    plan = place("helix", helix_problem("het42"), time_limit=20)
    assert plan.flow.value >= 5900
    assert plan.gap < 0.03


@needs_shared
@pytest.mark.parametrize("cluster", SETUPS)
@pytest.mark.parametrize("algorithm", ["swarm", "petals"])
def test_baselines_equal_the_published_placements(cluster: str, algorithm: str) -> None:
    published = read_placement(SHARED / "solutions" / SETUPS[cluster] / "llama70b" / f"{algorithm}.ini")
    assert place(algorithm, helix_problem(cluster)).placement == published


@needs_shared
def test_swarm_equals_the_published_placement_of_the_smaller_model() -> None:
    published = read_placement(SHARED / "solutions" / SETUPS["single24"] / "llama30b" / "swarm.ini")
    assert place("swarm", helix_problem("single24", "llama-30b")).placement == published


@settings(max_examples=30, deadline=None)
@given(problems())
def test_helix_finds_the_best_where_links_are_ample(task: Problem) -> None:
    best = best_flow(task)
    assume(best > 0)
    assert place("helix", task).flow.value >= best * (1 - NEARLY)


@settings(max_examples=30, deadline=None)
@given(problems(links=True, max_hosts=3))
def test_helix_tells_the_truth_where_links_bind(task: Problem) -> None:
    try:
        plan = place("helix", task)
    except InvalidArgument:
        return
    assert 0 < plan.flow.value <= best_flow(task) * (1 + 1e-9)
    assert plan.flow == evaluate(task, plan.placement)


@settings(max_examples=20, deadline=None)
@given(problems(links=True, max_hosts=3))
def test_the_original_milp_finds_the_best(task: Problem) -> None:
    best = best_flow(task)
    assume(best > 0)
    assert place("helix-milp", task).flow.value == pytest.approx(best, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_the_compact_milp_finds_the_best_and_bounds_it(task: Problem) -> None:
    best = best_flow(task)
    assume(best > 0)
    found = compact.solve(task, upper_bound(task), 10)
    assert found is not None
    placement, bound = found
    assert evaluate(task, placement).value == pytest.approx(best, rel=1e-4)
    assert bound >= best * (1 - 1e-6)


def aligned_flow(task: Problem, placement: dict[int, Span]) -> float:
    """Of a placement whose spans tile the layers; else 0."""
    rates: dict[Span, float] = defaultdict(float)
    for host, (first, end) in placement.items():
        rates[first, end] += task.throughput[host][end - first - 1]
    tiles = sorted(rates)
    tiled = tiles[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(tiles))
    return min(rates.values()) if tiled else 0.0


@settings(max_examples=40, deadline=None)
@given(problems())
def test_stages_carry_the_best_aligned_flow_and_no_more(task: Problem) -> None:
    best = max((aligned_flow(task, p) for p in placements(task)), default=0.0)
    assume(best > 0)
    regions = divide(task, AMPLE).regions
    stages = pipeline(regions, [], task.layers, best, 10)
    assert stages is not None
    assert sum(stage.layers for stage in stages[0]) == task.layers
    assert pipeline(regions, [], task.layers, best * 1.001, 10) is None


def test_patterns_are_as_few_hosts_as_suffice() -> None:
    region = Region(((10.0, 4.0), (3.0, 2.0)), (2, 3))
    assert {(s.layers, s.hosts) for s in patterns(region, 6.0)} == {
        (1, (1, 0)), (1, (0, 2)), (2, (2, 0)), (2, (1, 1)), (2, (0, 3)),
    }  # fmt: skip


def two_sites(across: float) -> Problem:
    """Two hosts here, two there; four of the five layers fit on either side."""
    links = mesh(4) | {(u, v): across for a, b in (((0, 1), (2, 3)), ((2, 3), (0, 1))) for u in a for v in b}
    return make(5, [(12.0, 6.0)] * 4, links)


def test_a_slow_crossing_is_widened() -> None:
    # A link carries 2: two hosts hand over to one.
    plan = place("helix", two_sites(2.0))
    assert plan.flow.value == pytest.approx(best_flow(two_sites(2.0)))
    assert plan.flow.value == 4.0


def test_hosts_with_the_wider_links_make_the_crossing() -> None:
    links = dict(two_sites(1.0).capacity)
    links[0, 3] = links[3, 0] = AMPLE
    task = make(5, [(12.0, 6.0)] * 4, links)
    assert place("helix", task).flow.value == pytest.approx(best_flow(task))


def test_sites_that_need_not_meet_work_side_by_side() -> None:
    task = make(4, [(12.0, 6.0)] * 4, two_sites(1.0).capacity)
    plan = place("helix", task)
    assert plan.flow.value == pytest.approx(best_flow(task)) == 12.0
    assert {edge for edge in plan.flow.edges if min(edge) >= 0} <= {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_large_clusters_are_dealt_into_decks() -> None:
    plan = place("helix", make(2, [(12.0, 6.0)] * 250))
    # Every host holds both layers.
    assert plan.flow.value == pytest.approx(plan.bound, rel=1e-3) == pytest.approx(250 * 6.0, rel=1e-3)


def test_a_deck_leaves_out_regions_that_are_too_small() -> None:
    layout = divide(two_sites(1.0), 12.0)
    assert [len(layout.part(deck, 3).regions) for deck in range(3)] == [2, 2, 0]


def test_links_only_ever_help() -> None:
    flows = [place("helix", two_sites(width)).flow.value for width in (0.5, 1.0, 2.0, 3.0, AMPLE)]
    assert flows == sorted(flows)


def test_only_some_hosts_know_the_coordinator() -> None:
    links = {edge: c for edge, c in mesh(3).items() if edge not in ((SOURCE, 0), (SOURCE, 1), (0, SINK), (2, SINK))}
    task = make(3, [(9.0,), (9.0,), (9.0,)], links)
    assert place("helix", task).placement == {2: (0, 1), 0: (1, 2), 1: (2, 3)}


def test_separate_gives_each_type_its_pipeline() -> None:
    task = make(2, [(9.0, 5.0), (4.0, 2.0), (4.0, 2.0)])
    plan = place("separate", task)
    assert plan.placement == {0: (0, 2), 1: (0, 1), 2: (1, 2)}
    assert plan.flow.value == 9.0


def test_separate_refuses_when_no_type_holds_the_model() -> None:
    with pytest.raises(InvalidArgument, match="no machine type can hold all 3 layers alone"):
        place("separate", make(3, [(9.0, 5.0), (4.0, 2.0)]))


def test_swarm_needs_enough_hosts() -> None:
    with pytest.raises(InvalidArgument, match="swarm needs 4 hosts for stages of 1 layers, and there are 2"):
        place("swarm", make(4, [(9.0, 5.0, 3.0), (4.0,)]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_problem_same_plan(algorithm: str) -> None:
    task = make(4, [(12.0, 7.0, 5.0, 4.0), (12.0, 7.0, 5.0, 4.0), (6.0, 3.0, 2.0, 1.0)])
    assert place(algorithm, task).placement == place(algorithm, task).placement


def test_unknown_algorithm() -> None:
    with pytest.raises(InvalidArgument, match="no algorithm 'magic': there are helix, "):
        place("magic", make(1, [(1.0,)]))


def test_the_original_milp_says_when_it_found_nothing() -> None:
    with pytest.raises(InvalidArgument, match="helix-milp found no placement in "):
        place("helix-milp", helix_problem("single24"), time_limit=0.1)


def test_without_time_there_is_still_a_plan_and_its_gap() -> None:
    plan = place("helix", helix_problem("quality10", "llama-30b"), time_limit=0.0)
    assert 0 < plan.flow.value <= plan.bound
    assert plan.gap == pytest.approx(1 - plan.flow.value / plan.bound)
