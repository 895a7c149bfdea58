"""The evaluator against a linear program, against Helix's published objectives, and on broken placements."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.errors import InvalidArgument
from kvmesh.planner import catalogue, problem
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.helix_files import read_placement
from kvmesh.planner.solver import Program
from kvmesh.planner.world import SINK, SOURCE, Problem, Span
from tests.unit.planner.problems import SHARED, make, needs_shared, placements, problems

SETUPS = {"single24": "single_cluster", "geo24": "distributed_clusters", "het42": "high_heterogeneity"}


def helix_problem(cluster: str, model: str = "llama2-70b") -> Problem:
    return problem.build(catalogue.cluster(cluster), catalogue.model(model), catalogue.workload("azure-conv"))


@pytest.mark.parametrize(("cluster", "flow"), [("single24", 1289.56), ("geo24", 1212.18), ("het42", 4137.55)])
def test_helix_published_objectives(cluster: str, flow: float) -> None:
    placement = read_placement(catalogue.HELIX / "placements" / f"{cluster}.ini")
    assert evaluate(helix_problem(cluster), placement).value == pytest.approx(flow, abs=0.01)


@needs_shared
@pytest.mark.parametrize(
    ("cluster", "algorithm", "flow"),
    [("geo24", "swarm", 616.46), ("het42", "swarm", 4892.24), ("single24", "petals", 531.70)],
)
def test_other_published_objectives(cluster: str, algorithm: str, flow: float) -> None:
    placement = read_placement(SHARED / "solutions" / SETUPS[cluster] / "llama70b" / f"{algorithm}.ini")
    assert evaluate(helix_problem(cluster), placement).value == pytest.approx(flow, abs=0.01)


def linear_program(task: Problem, placement: dict[int, Span], partial: bool) -> float:
    """Max flow again, by HiGHS and from the definition."""
    program = Program()
    rows = {host: program.row(0.0, 0.0) for host in placement}
    caps = {host: program.row(upper=task.throughput[host][end - first - 1]) for host, (first, end) in placement.items()}
    for (tail, head), capacity in task.capacity.items():
        if not {tail, head} <= {SOURCE, SINK, *placement}:
            continue
        end = placement[tail][1] if tail >= 0 else 0
        first, last = placement[head] if head >= 0 else (task.layers, task.layers)
        if end != first and not (partial and tail >= 0 and first < end < last):
            continue
        entries = {rows[tail]: -1.0} if tail >= 0 else {}
        entries |= {rows[head]: 1.0, caps[head]: 1.0} if head >= 0 else {}
        program.column(entries, cost=float(tail == SOURCE), limit=capacity)
    solution = program.solve() if program.costs else None
    return solution.objective if solution else 0.0


@settings(max_examples=60, deadline=None)
@given(problems(links=True, max_hosts=3), st.booleans(), st.randoms(use_true_random=False))
def test_equals_the_linear_program(task: Problem, partial: bool, random: object) -> None:
    found = list(placements(task))
    for placement in found[:: max(1, len(found) // 5)]:
        flow = evaluate(task, placement, partial)
        assert flow.value == pytest.approx(linear_program(task, placement, partial), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(problems(links=True, max_hosts=3), st.booleans())
def test_flow_is_conserved_and_within_capacities(task: Problem, partial: bool) -> None:
    for placement in list(placements(task))[:20]:
        flow = evaluate(task, placement, partial)
        assert all(0 < used <= task.capacity[edge] * (1 + 1e-9) for edge, used in flow.edges.items())
        for host, (first, end) in placement.items():
            out = sum(used for (tail, _), used in flow.edges.items() if tail == host)
            assert flow.through(host) == pytest.approx(out, abs=1e-6)
            assert flow.through(host) <= task.throughput[host][end - first - 1] * (1 + 1e-9)


def test_partial_inference_needs_overlap() -> None:
    task = make(3, [(9.0, 6.0), (9.0, 6.0)])
    overlapping = {0: (0, 2), 1: (1, 3)}
    assert evaluate(task, overlapping).value == 0
    assert evaluate(task, overlapping, partial=True).value == 6


def test_a_slow_link_binds() -> None:
    task = make(2, [(9.0,), (8.0,)])
    slow = make(2, [(9.0,), (8.0,)], {**task.capacity, (0, 1): 2.5})
    assert evaluate(task, {0: (0, 1), 1: (1, 2)}).value == 8
    assert evaluate(slow, {0: (0, 1), 1: (1, 2)}).value == 2.5


def test_wide_links_do_not_blur_a_small_flow() -> None:
    task = make(3, [(1.0, 0.5, 1 / 3)], {(SOURCE, 0): 1e12, (0, SINK): 1.0})
    assert evaluate(task, {0: (0, 3)}).value == pytest.approx(1 / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({0: (0, 1)}, "layer 1 is held by no host"),
        ({0: (0, 2), 1: (1, 3)}, "host h0 holds 2 layers but has memory for 1"),
        ({0: (0, 1), 1: (1, 4)}, "host h1 holds layers [1, 4) of 3"),
    ],
)
def test_infeasible_placements_are_named(placement: dict[int, Span], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message.replace("[", r"\[").replace(")", r"\)")):
        evaluate(make(3, [(9.0,), (9.0, 6.0)]), placement)


def test_every_fault_is_reported() -> None:
    with pytest.raises(InvalidArgument) as error:
        evaluate(make(3, [(9.0,), (9.0,)]), {0: (0, 2), 1: (2, 5)})
    assert len(error.value.violations) == 3


def test_published_placements_must_be_consecutive(tmp_path: Path) -> None:
    path = tmp_path / "placement.ini"
    path.write_text("[Settings]\noffset=2\n[Solution]\ncompute_node_2=[0, 1, 3]\n")
    with pytest.raises(InvalidArgument, match=r"\[Solution\] compute_node_2 is not a list of consecutive layers"):
        read_placement(path)
