"""Weights, estimates and ranks of placements; and that Helix's published runs come out of the simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.errors import InvalidArgument
from kvmesh.planner import catalogue, helix_files, problem
from kvmesh.planner.algorithms import place
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.pipelines import runs, trace
from kvmesh.planner.pipelines.estimate import Crossing, Mean, Visit, round_seconds, tokens_per_s
from kvmesh.planner.pipelines.execution import CHUNKED, BatchTimes
from kvmesh.planner.pipelines.ranking import candidates, estimated, rank, topologies
from kvmesh.planner.pipelines.simulation import Deployment
from kvmesh.planner.pipelines.weights import PIECES, USED, balanced
from kvmesh.planner.world import SINK, SOURCE
from tests.unit.planner.problems import make, mesh

MODEL, WORKLOAD = "llama2-70b", "azure-conv"
MEAN = Mean(750, 240, 250)
FLAT = BatchTimes((0.0, *(0.02 * n / 250 for n in range(1, 251))), (0.0,) + (0.01,) * 200, 0.0, 1, 200)
"""20 ms for a chunk, 10 ms for up to 200 decodes."""


def published(cluster: str) -> tuple[Deployment, dict[tuple[int, int], float]]:
    path = catalogue.HELIX / "placements" / f"{cluster}.ini"
    model, hosts = catalogue.model(MODEL), catalogue.cluster(cluster)
    task = problem.build(hosts, model, catalogue.workload(WORKLOAD))
    return Deployment(hosts, model, task, helix_files.read_placement(path)), helix_files.read_flow(path)


@pytest.mark.parametrize(("cluster", "flow"), [("single24", 1289.56), ("geo24", 1212.18), ("het42", 4137.55)])
def test_published_flows_are_maximum_flows_of_published_placements(cluster: str, flow: float) -> None:
    deployment, flows = published(cluster)
    assert sum(value for (tail, _), value in flows.items() if tail == SOURCE) == pytest.approx(flow, abs=0.01)
    assert evaluate(deployment.problem, deployment.placement).value == pytest.approx(flow, abs=0.01)


def test_simulation_reproduces_helix() -> None:
    """252.1 tokens/s in 600 s, 252.8 in the first 120 s; geo24: 98.0 in 600 s."""
    deployment, flows = published("single24")
    outcome = runs.offline(deployment, deployment.topology(flows), catalogue.workload(WORKLOAD), seconds=120)
    assert outcome.tokens_per_s == pytest.approx(252.8, rel=0.05)


def test_chunks_and_bounded_batches_beat_helix_on_its_own_placement() -> None:
    deployment, flows = published("geo24")
    topology, workload = deployment.topology(flows), catalogue.workload(WORKLOAD)
    helix = runs.offline(deployment, topology, workload, seconds=200)
    ours = runs.offline(deployment, topology, workload, CHUNKED, seconds=200)
    assert ours.tokens_per_s > 1.5 * helix.tokens_per_s
    assert ours.prompt_seconds < helix.prompt_seconds
    assert ours.decode_seconds < helix.decode_seconds


def test_a_published_flow_is_read_by_its_links() -> None:
    path = catalogue.HELIX / "placements" / "geo24.ini"
    assert helix_files.read_flow(path)[(1, SINK)] == pytest.approx(1212.18, abs=0.01)


def test_a_malformed_flow_is_refused_by_name(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.ini"
    path.write_text("[Flow]\nsource-0 = much\n")
    with pytest.raises(InvalidArgument, match="source-0"):
        helix_files.read_flow(path)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(10.0, 100.0), min_size=2, max_size=5), st.floats(5.0, 200.0))
def test_balanced_weights_are_a_flow_within_capacities(rates: list[float], link: float) -> None:
    hosts = len(rates)
    spans = {host: (0, 1) if host % 2 == 0 else (1, 2) for host in range(hosts)}
    task = make(2, [(rate,) for rate in rates], mesh(hosts, link))
    flows = balanced(task, spans)
    value = USED * evaluate(task, spans).value
    assert sum(flow for (tail, _), flow in flows.items() if tail == SOURCE) == pytest.approx(value)
    for host, rate in enumerate(rates):
        into = sum(flow for (_, head), flow in flows.items() if head == host)
        out = sum(flow for (tail, _), flow in flows.items() if tail == host)
        assert into == pytest.approx(out, abs=1e-6)
        assert into <= rate + 1e-6
    assert all(flow <= task.capacity[edge] + 1e-6 for edge, flow in flows.items())


def test_balanced_weights_load_equal_hosts_alike() -> None:
    task = make(2, [(50.0,), (50.0,), (60.0,)])
    flows = balanced(task, {0: (0, 1), 1: (0, 1), 2: (1, 2)})
    share = flows[SOURCE, 0] / (flows[SOURCE, 0] + flows[SOURCE, 1])
    assert 0.4 < share < 0.6
    assert sum(share for share, _ in PIECES) == pytest.approx(1.0)


def test_the_round_of_an_idle_cluster_is_its_batches_and_links() -> None:
    visits = [Visit(FLAT, 1.0, 100.0)] * 3
    assert round_seconds(visits, [Crossing(0.05, 1e9)], MEAN, 1e-9) == pytest.approx(0.05 + 3 * 0.01)


def test_rates_beyond_a_host_or_a_link_have_no_round() -> None:
    # 4 chunks of 20 ms each second of decodes at 320/s leave nothing; a link of 1000 tokens/s carries 242 decodes/s.
    assert round_seconds([Visit(FLAT, 1.0, 1e9)], [], MEAN, 4000.0) is None
    assert round_seconds([Visit(FLAT, 1.0, 1e9)], [Crossing(0.0, 1000.0)], MEAN, 250.0) is None
    assert round_seconds([Visit(FLAT, 1.0, 1e9)], [Crossing(0.0, 1000.0)], MEAN, 200.0) is not None


@settings(max_examples=40, deadline=None)
@given(st.floats(1.0, 500.0), st.floats(1.0, 500.0), st.integers(1, 30))
def test_more_kv_room_and_fewer_hosts_never_cost_tokens(room: float, other: float, hosts: int) -> None:
    small, large = sorted((room, other))
    rates = [tokens_per_s([Visit(FLAT, 1.0, kv)] * hosts, [], MEAN) for kv in (small, large)]
    assert rates[0] <= rates[1] + 1e-3
    assert tokens_per_s([Visit(FLAT, 1.0, small)] * (hosts + 1), [], MEAN) <= rates[0] + 1e-3


def test_littles_law_closes_the_estimate() -> None:
    visits = [Visit(FLAT, 1.0, 20.0)] * 10
    rate = tokens_per_s(visits, [], MEAN)
    seconds = round_seconds(visits, [], MEAN, rate)
    assert seconds is not None
    assert rate * seconds == pytest.approx(20.0, rel=0.01)


def test_ranks_are_sorted_and_finalists_simulated() -> None:
    deployment, _ = published("geo24")
    placements = [deployment.placement, place("swarm", deployment.problem).placement]
    ranked = rank(deployment, placements, catalogue.workload(WORKLOAD), finalists=2, seconds=40)
    assert [entry.simulated is not None for entry in ranked] == [True] * 2 + [False] * (len(ranked) - 2)
    assert (ranked[0].simulated or 0) >= (ranked[1].simulated or 0)
    rest = [entry.estimated for entry in ranked[2:]]
    assert rest == sorted(rest, reverse=True)


def test_candidates_are_feasible_and_the_first_is_the_largest() -> None:
    task = published("single24")[0].problem
    flows = [evaluate(task, placement).value for placement in candidates(task, 2045.6, 8.0)]
    assert flows[0] == max(flows)


def test_more_kv_room_is_worth_more() -> None:
    deployment, flows = published("single24")
    task = deployment.problem
    halved = replace(task, kv_entries=tuple(tuple(n // 2 for n in room) for room in task.kv_entries))
    workload = catalogue.workload(WORKLOAD)
    values = [
        estimated(option, option.topology(flows), workload)
        for option in (replace(deployment, problem=halved), deployment)
    ]
    assert values[0] < values[1]


def test_both_weightings_carry_the_same_hops() -> None:
    deployment, _ = published("single24")
    flow, even = topologies(deployment)
    assert {tail: set(heads) for tail, heads in flow.hops.items()} == {t: set(h) for t, h in even.hops.items()}


def test_the_shipped_trace_is_helixs() -> None:
    assert len(trace.lengths()) == 16_657
    assert len(trace.counts()) == 1200
    assert max(prompt for prompt, _ in trace.lengths()) < 2048
