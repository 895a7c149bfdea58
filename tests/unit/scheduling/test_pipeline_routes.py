"""Per-request pipelines: shares follow flows, masks hold, KV is given back."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.scheduling.interleaved import (
    InterleavedRoundRobin,
    Marks,
    PipelineScheduler,
    RandomRoutes,
    Room,
    Route,
    ShortestQueueRoutes,
    SwarmRoutes,
    Topology,
)

SOURCE, SINK = -1, -2
AMPLE = 1e12


def fan(flows: list[float], entries: float = AMPLE, layers: int = 4) -> Topology:
    """One stage: the coordinator, hosts with these flows, the coordinator."""
    hosts = dict(enumerate(flows))
    rooms = {host: Room(0, layers, entries) for host in hosts}
    return Topology(SOURCE, SINK, rooms, {SOURCE: hosts} | {host: {SINK: flow} for host, flow in hosts.items()})


def two_stages(entries: float) -> Topology:
    rooms = {0: Room(0, 2, entries), 1: Room(0, 2, entries), 2: Room(2, 4, entries)}
    hops = {SOURCE: {0: 3.0, 1: 1.0}, 0: {2: 3.0}, 1: {2: 1.0}, 2: {SINK: 4.0}}
    return Topology(SOURCE, SINK, rooms, hops)


def routed(scheduler: PipelineScheduler, tokens: int) -> Route:
    route = scheduler.route(tokens)
    assert route is not None
    return route


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1.0, 10.0), min_size=2, max_size=8),
    st.lists(st.integers(1, 500), min_size=200, max_size=300),
)
def test_shares_of_work_follow_flows_up_to_one_request(flows: list[float], prompts: list[int]) -> None:
    scheduler = InterleavedRoundRobin(fan(flows), Marks(1.0, 0.0, 0.0))
    work = Counter[int]()
    for tokens in prompts:
        work[routed(scheduler, tokens).hosts[0]] += tokens
    usable = scheduler.hops[SOURCE]
    for host, flow in usable.items():
        ideal = sum(prompts) * flow / sum(usable.values())
        assert abs(work[host] - ideal) <= max(prompts) * len(flows)


def test_equal_flows_alternate() -> None:
    scheduler = InterleavedRoundRobin(fan([1.0, 1.0, 1.0]), Marks(1.0, 0.0, 0.0))
    assert [routed(scheduler, 10).hosts[0] for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_decode_steps_count_as_work() -> None:
    scheduler = InterleavedRoundRobin(fan([1.0, 1.0]), Marks(1.0, 0.0, 0.0))
    first = routed(scheduler, 10)
    for _ in range(100):
        scheduler.step(first)
    assert {routed(scheduler, 10).hosts[0] for _ in range(5)} == {1}


def test_a_hop_below_five_percent_is_never_used() -> None:
    scheduler = InterleavedRoundRobin(fan([97.0, 4.0]), Marks(1.0, 0.0, 0.0))
    assert {routed(scheduler, 10).hosts for _ in range(200)} == {(0,)}


def test_a_full_host_is_passed_over_until_a_request_ends() -> None:
    scheduler = InterleavedRoundRobin(fan([1.0, 1.0], entries=4000.0), Marks(0.5, 0.0, 0.0))
    running = [routed(scheduler, 400), routed(scheduler, 400)]
    assert {route.hosts for route in running} == {(0,), (1,)}
    assert scheduler.route(400) is None
    scheduler.finish(running[1])
    assert routed(scheduler, 400).hosts == running[1].hosts


def test_a_request_that_finds_no_path_leaves_no_trace() -> None:
    topology = two_stages(entries=2000.0)
    scheduler = InterleavedRoundRobin(topology, Marks(1.0, 0.0, 0.0))
    running = routed(scheduler, 600)
    before = {host: dict(loads) for host, loads in scheduler.loads.items()}, dict(scheduler.ledger.used)
    assert scheduler.route(600) is None
    loads = {host: pytest.approx(heads) for host, heads in before[0].items()}
    assert scheduler.loads == loads
    assert scheduler.ledger.used == before[1]
    scheduler.finish(running)
    assert set(scheduler.ledger.used.values()) == {0}


def test_expected_need_counts_a_share_of_the_mean_output() -> None:
    assert Marks(0.9, 0.6, 240).expected(100) == 244
    assert Marks(0.85, 1.0, 240).expected(100) == 340


def test_fullest_is_that_of_the_fullest_layer_over_all_its_hosts() -> None:
    scheduler = InterleavedRoundRobin(two_stages(entries=2000.0), Marks(1.0, 0.0, 0.0))
    routed(scheduler, 100)
    assert scheduler.ledger.fullest() == pytest.approx(100 * 2 / 2000)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["random", "swarm", "shortest", "round-robin"]), st.lists(st.integers(1, 900), max_size=60))
def test_no_scheduler_passes_the_high_water_mark(name: str, prompts: list[int]) -> None:
    topology, marks = two_stages(entries=10_000.0), Marks(0.8, 1.0, 50.0)
    scheduler: PipelineScheduler = {
        "random": RandomRoutes(topology, marks),
        "swarm": SwarmRoutes(topology, marks),
        "shortest": ShortestQueueRoutes(topology, marks, lambda host: host),
        "round-robin": InterleavedRoundRobin(topology, marks),
    }[name]
    routes = [route for tokens in prompts if (route := scheduler.route(tokens))]
    assert all(used <= 0.8 * 10_000 for used in scheduler.ledger.used.values())
    for route in routes:
        scheduler.finish(route)
    assert set(scheduler.ledger.used.values()) == {0}


def test_shortest_queue_goes_where_fewest_wait() -> None:
    scheduler = ShortestQueueRoutes(fan([1.0, 1.0, 1.0]), Marks(1.0, 0.0, 0.0), lambda host: abs(host - 2))
    assert {routed(scheduler, 10).hosts[0] for _ in range(20)} == {2}


def test_swarm_prefers_hosts_that_answer_sooner() -> None:
    scheduler = SwarmRoutes(fan([1.0, 1.0]), Marks(1.0, 0.0, 0.0))
    for _ in range(100):
        scheduler.observe(SOURCE, 0, 1.0)
        scheduler.observe(SOURCE, 1, 4.0)
    chosen = Counter(routed(scheduler, 10).hosts[0] for _ in range(100))
    assert chosen[0] == pytest.approx(80, abs=2)
