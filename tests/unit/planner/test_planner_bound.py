"""The bound against every placement of small clusters, and against what Gurobi proved."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from kvmesh.planner.bound import closed_form, upper_bound
from kvmesh.planner.world import Problem
from tests.unit.planner.problems import best_flow, make, problems
from tests.unit.planner.test_planner_evaluator import helix_problem


@settings(max_examples=25, deadline=None)
@given(problems(links=True, max_hosts=3))
def test_no_placement_beats_it(task: Problem) -> None:
    bound = upper_bound(task)
    assert best_flow(task) <= bound * (1 + 1e-6)
    assert best_flow(task, partial=True) <= bound * (1 + 1e-6)
    assert bound <= closed_form(task) * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(problems())
def test_another_host_never_lowers_it(task: Problem) -> None:
    more = make(task.layers, [*task.throughput, task.throughput[0]])
    assert upper_bound(more) >= upper_bound(task) * (1 - 1e-3)


def test_it_proves_in_milliseconds_what_gurobi_proved_in_an_hour() -> None:
    # 4 L4 + 6 T4, 30B: 286.587 after 3,803 s, where the closed form stays at 340.7.
    task = helix_problem("quality10", "llama-30b")
    assert closed_form(task) == pytest.approx(340.70, abs=0.01)
    assert 286.587 <= upper_bound(task) < 286.587 * 1.002


@pytest.mark.parametrize(("cluster", "bound"), [("single24", 2045.64), ("het42", 6061.5)])
def test_published_clusters(cluster: str, bound: float) -> None:
    assert upper_bound(helix_problem(cluster)) == pytest.approx(bound, rel=1e-3)


def test_coordinator_links_limit_it() -> None:
    task = make(1, [(9.0,)])
    assert upper_bound(make(1, [(9.0,)], {**task.capacity, (-1, 0): 4.0})) == pytest.approx(4.0)
