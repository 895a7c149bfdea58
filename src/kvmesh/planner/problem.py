"""Turns a cluster, a model and a workload into the numbers that algorithms and evaluator share; refuses the impossible.

Half of a host's memory is for weights and the rest for KV, Helix's rule. Knows no algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvmesh.errors import InvalidArgument
from kvmesh.planner.profiles import ModelProfile, throughput_tables
from kvmesh.planner.world import SINK, SOURCE, Cluster, Edge, Host, Problem, Workload

WEIGHTS_SHARE = 0.5


def build(cluster: Cluster, model: ModelProfile, workload: Workload) -> Problem:
    """Raises InvalidArgument, one sentence per fault, that names the host and the constraint that fails first."""
    _refuse(_unprofiled(cluster, model))
    room = [_room(host, model) for host in cluster.hosts]
    _refuse(_too_small(cluster, model, room))
    _refuse(_unconnected(cluster))
    _refuse(_split(cluster, model, room))
    tables = throughput_tables(model, cluster.mix(), workload)
    return Problem(
        hosts=tuple(host.name for host in cluster.hosts),
        machines=tuple(host.machine for host in cluster.hosts),
        layers=model.layers,
        throughput=tuple(
            tuple(min(t, host.nic_bytes_per_s / model.activation_bytes) for t in tables[host.machine][:most])
            for host, most in zip(cluster.hosts, room, strict=True)
        ),
        kv_entries=tuple(
            model.machines[host.machine].kv_entries[:most] for host, most in zip(cluster.hosts, room, strict=True)
        ),
        capacity={edge: link.bytes_per_s / _bytes_per_token(edge, model) for edge, link in cluster.links.items()},
    )


def _bytes_per_token(edge: Edge, model: ModelProfile) -> float:
    return model.token_bytes if SOURCE in edge or SINK in edge else model.activation_bytes


def _room(host: Host, model: ModelProfile) -> int:
    """Layers that the host may hold, by memory and by what was profiled."""
    weights = WEIGHTS_SHARE * host.memory_bytes + 1
    return min(int(weights / model.bytes_per_layer), len(model.machines[host.machine].kv_entries))


def _unprofiled(cluster: Cluster, model: ModelProfile) -> Iterator[tuple[str, str]]:
    for machine in cluster.mix():
        if machine not in model.machines:
            host = next(host.name for host in cluster.hosts if host.machine == machine)
            yield f"host {host}", f"is a {machine}, on which {model.name} has no profile ({', '.join(model.machines)})"


def _too_small(cluster: Cluster, model: ModelProfile, room: list[int]) -> Iterator[tuple[str, str]]:
    if sum(room) >= model.layers:
        return
    largest = max(cluster.hosts, key=lambda host: host.memory_bytes)
    yield (
        f"cluster {cluster.name}",
        f"cannot hold {model.name}: half of the memory of its {len(room)} hosts has room for {sum(room)} layers of"
        f" {model.layers} ({model.bytes_per_layer / 1e9:.2f} GB each; the largest host, {largest.name}, has"
        f" {largest.memory_bytes / 1e9:.0f} GB)",
    )


def _unconnected(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Hosts that the coordinator's tokens cannot reach, or that cannot reach it."""
    for root, way, verb in ((SOURCE, 1, "cannot be reached from"), (SINK, -1, "cannot reach")):
        reached, frontier = {root}, {root}
        while frontier:
            frontier = {edge[::way][1] for edge in cluster.links if edge[::way][0] in frontier} - reached
            reached |= frontier
        for index, host in enumerate(cluster.hosts):
            if index not in reached:
                yield f"host {host.name}", f"{verb} the coordinator over any link"


def _split(cluster: Cluster, model: ModelProfile, room: list[int]) -> Iterator[tuple[str, str]]:
    """The model must fit on hosts that are linked to each other."""
    parts = islands(cluster)
    largest = max(parts, key=lambda part: sum(room[host] for host in part))
    if sum(room[host] for host in largest) < model.layers:
        outside = next(part for part in parts if part is not largest)
        names = [cluster.hosts[min(part)].name for part in (largest, outside)]
        yield (
            f"host {names[1]}",
            f"has no link to the region of host {names[0]}, and the {len(largest)} hosts there have room for only"
            f" {sum(room[host] for host in largest)} of {model.layers} layers of {model.name}",
        )


def islands(cluster: Cluster) -> list[set[int]]:
    """Hosts linked to each other, directly or over other hosts."""
    parts: list[set[int]] = []
    for host in range(len(cluster.hosts)):
        peers = {host} | {v for u, v in cluster.links if u == host and v >= 0}
        touching = [part for part in parts if part & peers]
        parts = [part for part in parts if not part & peers] + [peers.union(*touching)]
    return parts


def _refuse(faults: Iterator[tuple[str, str]]) -> None:
    if found := list(faults):
        raise InvalidArgument(violations=found)
