"""The pipeline simulation against closed forms: rates, M/D/1, Little's law, conservation; determinism by seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest

from kvmesh.planner.pipelines.clock import Clock
from kvmesh.planner.pipelines.execution import CHUNKED, HELIX, BatchTimes, Execution, batch_times
from kvmesh.planner.pipelines.feeds import Backlog, Offline, Online, Population, arrivals
from kvmesh.planner.pipelines.jobs import Job, Request, chunks
from kvmesh.planner.pipelines.simulation import Deployment, Simulation
from kvmesh.planner.pipelines.stations import Station
from kvmesh.planner.pipelines.wires import Wire
from kvmesh.planner.profiles import MachineProfile, ModelProfile
from kvmesh.planner.world import SINK, SOURCE, Cluster, Host, Link, Problem, Span
from kvmesh.scheduling.interleaved import InterleavedRoundRobin, Marks

MACHINE = MachineProfile(
    2, 4, 10.0, (400_000,) * 4, ((0, 0.0), (1000, 100.0)), ((0, 0.0), (2, 4.0), (100, 4.0)), 1, (100,) * 4
)
"""0.1 ms for a prompt token and 4 ms for any decodes, each layer."""
MODEL = ModelProfile("toy", 4, 1e9, 2, 0.001, {"m": MACHINE})
SPANS: dict[int, Span] = {0: (0, 2), 1: (2, 4)}


def deploy(spans: Mapping[int, Span] = SPANS, bytes_per_s: float = 1e12, latency: float = 0.0) -> Deployment:
    count = len(spans)
    edges = {(u, v) for u in (SOURCE, *spans) for v in (SINK, *spans) if u != v and (u, v) != (SOURCE, SINK)}
    hosts = tuple(Host(f"h{i}", "m", 16e9, 1e12) for i in range(count))
    cluster = Cluster("toy", hosts, dict.fromkeys(edges, Link(bytes_per_s, latency)))
    names = tuple(host.name for host in hosts)
    table = tuple(1000.0 / k for k in range(1, 5))
    problem = Problem(
        names, ("m",) * count, 4, (table,) * count, (MACHINE.kv_entries,) * count, dict.fromkeys(edges, 1e9)
    )
    return Deployment(cluster, MODEL, problem, spans)


def simulate(deployment: Deployment, execution: Execution = HELIX) -> Simulation:
    marks = Marks(0.9, 1.0, 5.0)
    return Simulation(deployment, deployment.topology(), lambda t, _: InterleavedRoundRobin(t, marks), execution)


def test_a_lone_request_takes_the_sum_of_its_batches_and_latencies() -> None:
    outcome = simulate(deploy(latency=0.5)).run(Online([(0.0, 100, 3)]), 100.0)
    # Four layers of 10 ms and three links; then three lone decodes, twice 2 ms a layer.
    assert outcome.prompt_latencies == pytest.approx([1.5 + 4 * 0.010], rel=1e-6)
    assert outcome.decode_latencies == pytest.approx([1.5 + 4 * 2 * 0.002] * 3, rel=1e-6)
    assert outcome.finished == 1


def test_chunks_overlap_on_successive_hosts() -> None:
    whole = simulate(deploy()).run(Online([(0.0, 1000, 1)]), 100.0)
    parts = simulate(deploy(), replace(CHUNKED, chunk_tokens=250)).run(Online([(0.0, 1000, 1)]), 100.0)
    assert whole.prompt_seconds == pytest.approx(0.4, rel=1e-5)
    # Four chunks through two hosts of 50 ms each: five steps.
    assert parts.prompt_seconds == pytest.approx(0.25, rel=1e-5)


def test_a_saturated_host_serves_at_its_rate() -> None:
    deployment = deploy({0: (0, 4)})
    outcome = simulate(deployment).run(Online([(0.0, 500, 1) for _ in range(300)]), 50.0)
    # Every batch has a prompt, 200 ms, and the lone decode of the one before, twice 2 ms a layer.
    assert len(outcome.prompt_latencies) / 50.0 == pytest.approx(1 / 0.216, rel=0.01)
    assert outcome.busy[0] == pytest.approx(1.0, abs=0.01)


def test_waiting_at_one_host_is_that_of_m_d_1() -> None:
    """Prompts of one length at Poisson times; a queue of deterministic service."""
    clock, load, service, count = Clock(), 0.7, 0.1, 40_000
    done: list[float] = []
    times = BatchTimes((0.0,) * 100 + (service,), (0.0, 0.0), 0.0, 1, 1)
    station = Station(clock, times, HELIX, lambda _, batch: done.extend(clock.now - job.left for job in batch), 0)
    chance, now = Random(0), 0.0
    for _ in range(count):
        now += chance.expovariate(load / service)
        clock.at(now, station.receive, [Job(Request(100, 1, now), 100, False, left=now)])
    clock.run(now + 1000)
    waiting = sum(done) / count - service
    assert len(done) == count
    assert waiting == pytest.approx(service * load / (2 * (1 - load)), rel=0.05)


def test_littles_law_holds_for_running_requests() -> None:
    requests = arrivals([(200, 5), (400, 10)], [3, 5], tokens_per_s=2000, seconds=300)
    simulation = simulate(deploy(), CHUNKED)
    levels: list[int] = []
    for tick in range(6000):
        simulation.clock.at(tick / 20, lambda _: levels.append(simulation.running), None)
    outcome = simulation.run(Online(requests), 300.0)
    inside = sum(outcome.prompt_latencies) + sum(outcome.decode_latencies)
    assert sum(levels) / 6000 == pytest.approx(inside / 300, rel=0.03)


@pytest.mark.parametrize("execution", [HELIX, CHUNKED])
def test_every_token_of_every_request_comes_out_once(execution: Execution) -> None:
    requests = [(0.05 * i, 50 + 97 * i % 900, 1 + i % 17) for i in range(60)]
    simulation = simulate(deploy(), execution)
    outcome = simulation.run(Online(requests), 1e4)
    assert outcome.finished == len(outcome.prompt_latencies) == 60
    assert len(outcome.decode_latencies) == sum(output for _, _, output in requests)
    assert simulation.running == 0
    assert set(simulation.scheduler.ledger.used.values()) == {0}
    assert all(not station.waiting for station in simulation.stations.values())


@pytest.mark.parametrize("execution", [HELIX, CHUNKED])
def test_equal_seeds_give_equal_runs(execution: Execution) -> None:
    lengths = [(100 + i, 3 + i % 7) for i in range(200)]

    def run(seed: int) -> tuple[list[float], list[float]]:
        feed = Offline(lengths, seed) if execution is HELIX else Backlog(lengths, 3, seed)
        outcome = simulate(deploy(), execution).run(feed, 30.0)
        return outcome.prompt_latencies, outcome.decode_latencies

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_offline_never_fills_kv_beyond_the_mark() -> None:
    simulation = simulate(deploy())
    peaks: list[float] = []
    for second in range(60):
        simulation.clock.at(second + 0.5, lambda _: peaks.append(simulation.scheduler.ledger.fullest()), None)
    simulation.run(Offline([(700, 300)]), 60.0)
    assert 0.7 < max(peaks) <= 0.9


def test_a_request_without_room_waits_at_the_coordinator_and_none_is_lost() -> None:
    requests = [(0.0, 2000, 4)] * 200  # two layers of 400,000 entries hold 89 of 2005 positions
    outcome = simulate(deploy()).run(Online(requests), 1e4)
    assert outcome.finished == 200
    assert outcome.turned_away > 0


def test_backlog_keeps_so_many_prompts_under_way_and_drops_none() -> None:
    simulation = simulate(deploy(), CHUNKED)
    feed = Backlog([(700, 50)], prompts=3)
    seen: list[int] = []
    for second in range(30):
        simulation.clock.at(second + 0.5, lambda _: seen.append(feed.under_way), None)
    outcome = simulation.run(feed, 30.0)
    assert set(seen[:3]) == {3}
    assert max(seen) == 3
    assert outcome.finished > 0


def test_arrivals_have_the_rate_that_was_asked_for() -> None:
    rows = arrivals([(300, 100), (500, 100)], [1, 2, 9], tokens_per_s=1000, seconds=6000, seed=3)
    assert sum(prompt + output for _, prompt, output in rows) / 6000 == pytest.approx(1000, rel=0.05)
    assert rows == sorted(rows)
    assert rows[-1][0] < 6000


@pytest.mark.parametrize(("tokens", "size", "parts"), [(1, 256, 1), (256, 256, 1), (257, 256, 2), (2047, 256, 8)])
def test_chunks_are_whole_prompts_in_order(tokens: int, size: int, parts: int) -> None:
    jobs = chunks(Request(tokens, 1, 0.0), size)
    assert len(jobs) == parts
    assert sum(job.tokens for job in jobs) == tokens
    assert max(job.tokens for job in jobs) <= size
    assert [job.last for job in jobs] == [False] * (parts - 1) + [True]


def test_messages_wait_for_each_other_and_then_travel() -> None:
    clock, got = Clock(), list[tuple[str, float]]()
    wire = Wire(clock, 10.0, 1.0, lambda name: got.append((name, clock.now)))
    wire.send("prompt", 50.0, False)
    wire.send("token", 10.0, True)
    clock.run(100.0)
    assert got == [("prompt", 6.0), ("token", 7.0)]


def test_urgent_messages_pass_and_hold_up_the_rest_by_their_own_time() -> None:
    clock, got = Clock(), list[tuple[str, float]]()
    wire = Wire(clock, 10.0, 1.0, lambda name: got.append((name, clock.now)), express=True)
    wire.send("prompt", 50.0, False)
    wire.send("second", 50.0, False)
    for time in (2.0, 7.0):
        clock.at(time, lambda name: wire.send(name, 10.0, True), f"token {time:g}")
    clock.run(100.0)
    assert got == [("token 2", 4.0), ("prompt", 7.0), ("token 7", 9.0), ("second", 13.0)]


def test_copying_is_charged_once_for_all_that_came_since_the_last_batch() -> None:
    times = batch_times(MACHINE, 2, 1e6)
    assert times.seconds(100, 0, 100) == pytest.approx(2 * 0.010 + 100 * 1e6 * (1 / 4e9 + 1 / 5e9))


def test_a_population_stays_what_it_is() -> None:
    simulation = simulate(deploy(), HELIX)
    seen: list[int] = []
    for tick in range(100, 600):
        simulation.clock.at(tick / 10, lambda _: seen.append(simulation.running), None)
    outcome = simulation.run(Population([(100 + i, 20 + 7 * i) for i in range(20)], 8), 60.0)
    assert max(seen) == 8
    assert min(seen) >= 4, "each is replaced a tenth of a second after it ends"
    assert outcome.finished > 20
