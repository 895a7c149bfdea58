"""Requests through a placement, event by event: `Simulation(...).run(feed, seconds)`.

Hosts hold spans of layers and compute batches (`stations`); links take messages one after the other (`wires`); the
coordinator sends prompts and tokens out and collects what comes back. Which way a request goes is decided by a
`PipelineScheduler`, the object that a router would run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor
from typing import Protocol

from kvmesh.planner.pipelines.clock import Clock
from kvmesh.planner.pipelines.execution import HELIX, Execution, batch_times
from kvmesh.planner.pipelines.jobs import Job, Request, chunks
from kvmesh.planner.pipelines.outcome import Outcome
from kvmesh.planner.pipelines.stations import Batch, Station
from kvmesh.planner.pipelines.weights import balanced
from kvmesh.planner.pipelines.wires import Wire
from kvmesh.planner.profiles import ModelProfile
from kvmesh.planner.world import SINK, SOURCE, Cluster, Edge, Problem, Span
from kvmesh.scheduling.interleaved import PipelineScheduler, Room, Topology

COORDINATOR_NIC = 10e9
"""Bytes/s."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What stands: a cluster and a model with a placement, and the numbers that the planner made of them."""

    cluster: Cluster
    model: ModelProfile
    problem: Problem
    placement: Mapping[int, Span]

    def topology(self, flows: Mapping[Edge, float] | None = None) -> Topology:
        """Hosts and hops as the scheduler sees them, weighed by `flows` (tokens/s), else by balanced ones."""
        weights = balanced(self.problem, self.placement) if flows is None else flows
        hops: dict[int, dict[int, float]] = {host: {} for host in (SOURCE, *self.placement)}
        for (tail, head), flow in weights.items():
            hops[tail][head] = flow
        rooms = {host: Room(first, end, self._entries(host)) for host, (first, end) in self.placement.items()}
        return Topology(SOURCE, SINK, rooms, hops)

    def _entries(self, host: int) -> float:
        first, end = self.placement[host]
        return self.problem.kv_entries[host][end - first - 1]


class Feed(Protocol):
    """Where requests come from."""

    def start(self, simulation: Simulation) -> None: ...

    def prompt_done(self, simulation: Simulation) -> None: ...

    def request_done(self, simulation: Simulation) -> None: ...

    def turned_away(self, simulation: Simulation, request: Request) -> None: ...


class Simulation:
    """One run; `schedule` makes the scheduler, and may look at stations (shortest queue)."""

    def __init__(
        self,
        deployment: Deployment,
        topology: Topology,
        schedule: Callable[[Topology, Callable[[int], int]], PipelineScheduler],
        execution: Execution = HELIX,
        measured_from: float = 0.0,
    ) -> None:
        self.clock, self.execution, self.model = Clock(), execution, deployment.model
        self.outcome = Outcome(measured_from)
        self.scheduler = schedule(topology, lambda host: self.stations[host].waiting if host >= 0 else 0)
        self.stations = {host: self._station(deployment, host) for host in deployment.placement}
        self.wires = {
            (tail, head): self._wire(deployment.cluster, topology, (tail, head))
            for tail, heads in topology.hops.items()
            for head in heads
        }
        self.running = 0

    def run(self, feed: Feed, seconds: float) -> Outcome:
        self.feed = feed
        feed.start(self)
        self.clock.run(seconds)
        self.outcome.close(seconds, self.clock.events, self.stations.values())
        return self.outcome

    def submit(self, request: Request) -> None:
        """A request has arrived: it starts, or the feed decides what becomes of it."""
        request.route = self.scheduler.route(request.prompt)
        if request.route is None:
            self.outcome.turned_away += 1
            self.feed.turned_away(self, request)
            return
        self.running += 1
        for job in chunks(request, self.execution.chunk_tokens):
            self._send(SOURCE, request.hosts[0], [job])

    def _station(self, deployment: Deployment, host: int) -> Station:
        first, end = deployment.placement[host]
        profile = deployment.model.machines[deployment.problem.machines[host]]
        times = batch_times(profile, end - first, deployment.model.activation_bytes)
        return Station(self.clock, times, self.execution, self._computed, host)

    def _wire(self, cluster: Cluster, topology: Topology, edge: Edge) -> Wire:
        link, head = cluster.links[edge], edge[1]
        speed = floor(min(link.bytes_per_s, self._nic_share(cluster, topology, edge)))
        deliver = self._returned if head == SINK else self.stations[head].receive
        return Wire(self.clock, speed, link.seconds, deliver, self.execution.express)

    def _nic_share(self, cluster: Cluster, topology: Topology, edge: Edge) -> float:
        """Both ends' network cards are shared by flow; hops without flow share alike."""
        tail, head = edge
        sent = topology.hops[tail]
        received = {host: heads[head] for host, heads in topology.hops.items() if head in heads}
        out = COORDINATOR_NIC if tail == SOURCE else cluster.hosts[tail].nic_bytes_per_s
        into = COORDINATOR_NIC if head == SINK else cluster.hosts[head].nic_bytes_per_s
        return min(out * _share(sent, head), into * _share(received, tail))

    def _send(self, tail: int, head: int, jobs: Batch) -> None:
        tokens = sum(job.tokens or 1 for job in jobs)
        size = self.model.token_bytes + (0.0 if tail == SOURCE or head == SINK else self.model.activation_bytes)
        self.wires[tail, head].send(jobs, tokens * size, jobs[0].decode)

    def _computed(self, station: Station, batch: Batch) -> None:
        """A batch is done: its jobs go to their next hosts, alone or together."""
        parcels: dict[tuple[int, bool], Batch] = {}
        for job in batch:
            hosts = job.request.hosts
            tail = hosts[job.hop - 1] if job.hop else SOURCE
            self.scheduler.observe(tail, station.host, self.clock.now - job.left)
            job.hop, job.left = job.hop + 1, self.clock.now
            head = hosts[job.hop] if job.hop < len(hosts) else SINK
            if self.execution.together and job.decode:
                parcels.setdefault((head, True), []).append(job)
            else:
                self._send(station.host, head, [job])
        for (head, _), jobs in parcels.items():
            self._send(station.host, head, jobs)

    def _returned(self, jobs: Batch) -> None:
        """The coordinator has the outputs of the last layer."""
        steps: dict[int, Batch] = {}
        for job in jobs:
            if job.last:
                self._advance(job, steps)
        for first, batch in steps.items():
            self._send(SOURCE, first, batch)

    def _advance(self, job: Job, steps: dict[int, Batch]) -> None:
        request, now = job.request, self.clock.now
        self.outcome.record(now, now - request.asked, job.decode)
        request.asked = now
        if job.decode:
            request.produced += 1
        if request.produced == request.output:
            self._finish(request)
            return
        assert request.route is not None
        self.scheduler.step(request.route)
        next_step = Job(request, 0, True, left=now)
        if self.execution.together:
            steps.setdefault(request.hosts[0], []).append(next_step)
        else:
            self._send(SOURCE, request.hosts[0], [next_step])
        if not job.decode:
            self.feed.prompt_done(self)

    def _finish(self, request: Request) -> None:
        assert request.route is not None
        self.running -= 1
        self.outcome.finished += 1
        self.scheduler.finish(request.route)
        self.feed.request_done(self)


def _share(flows: Mapping[int, float], key: int) -> float:
    total = sum(flows.values())
    return flows[key] / total if flows[key] else 1 / len(flows)
