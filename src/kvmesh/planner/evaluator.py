"""The independent judge of a placement: is it feasible, and how many tokens/s flow, by max flow on the node graph.

Shares no code with the algorithms. Dinic's algorithm on floats: the bottleneck of each augmenting path becomes exactly
zero, so it ends as with integers. Source and sink are the coordinator; host i is an edge of capacity T_i(layers held);
i→j exists where i's span ends at j's start or, with partial inference, inside j's span (Helix, ASPLOS 2025, section 4).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from kvmesh.errors import InvalidArgument
from kvmesh.planner.world import SINK, SOURCE, Edge, Flow, Problem, Span

Residual = dict[int, dict[int, float]]


def faults(problem: Problem, placement: Mapping[int, Span]) -> Iterator[tuple[str, str]]:
    """(host or layers, what is wrong) for every broken constraint of layers and memory."""
    held = [0] * problem.layers
    for host, (first, end) in placement.items():
        if not 0 <= first < end <= problem.layers:
            yield f"host {problem.hosts[host]}", f"holds layers [{first}, {end}) of {problem.layers}"
            continue
        if end - first > problem.max_layers(host):
            room = problem.max_layers(host)
            yield f"host {problem.hosts[host]}", f"holds {end - first} layers but has memory for {room}"
        held[first:end] = [count + 1 for count in held[first:end]]
    if 0 in held:
        yield f"layer {held.index(0)}", "is held by no host"


def evaluate(problem: Problem, placement: Mapping[int, Span], partial: bool = False) -> Flow:
    """The maximum flow. Raises InvalidArgument for an infeasible placement, with every fault."""
    if found := list(faults(problem, placement)):
        raise InvalidArgument(violations=found)
    residual = _graph(problem, placement, partial)
    before = {tail: dict(heads) for tail, heads in residual.items()}
    while levels := _levels(residual):
        while _augment(residual, levels, SOURCE, float("inf")):
            pass
    return _flow(before, residual)


def _valid(problem: Problem, placement: Mapping[int, Span], edge: Edge, partial: bool) -> bool:
    tail, head = edge
    end = 0 if tail == SOURCE else placement[tail][1]
    if head == SINK:
        return end == problem.layers
    first, last = placement[head]
    return end == first or (partial and tail != SOURCE and first < end < last)


def _graph(problem: Problem, placement: Mapping[int, Span], partial: bool) -> Residual:
    """Host i is node 2i (in) and 2i + 1 (out)."""
    residual: Residual = {SOURCE: {}, SINK: {}}
    for host, (first, end) in placement.items():
        residual[2 * host] = {2 * host + 1: problem.throughput[host][end - first - 1]}
        residual[2 * host + 1] = {2 * host: 0.0}
    ends = {SOURCE, SINK, *placement}
    for (tail, head), capacity in problem.capacity.items():
        if tail in ends and head in ends and _valid(problem, placement, (tail, head), partial):
            u, v = tail if tail == SOURCE else 2 * tail + 1, head if head == SINK else 2 * head
            residual[u][v] = capacity
            residual[v].setdefault(u, 0.0)
    return residual


def _levels(residual: Residual) -> dict[int, int]:
    """Breadth first from the source; empty when the sink is cut off."""
    levels, queue = {SOURCE: 0}, deque([SOURCE])
    while queue:
        node = queue.popleft()
        for neighbour, room in residual[node].items():
            if room > 0 and neighbour not in levels:
                levels[neighbour] = levels[node] + 1
                queue.append(neighbour)
    return levels if SINK in levels else {}


def _augment(residual: Residual, levels: dict[int, int], node: int, limit: float) -> float:
    """Pushes what one path of the level graph bears; a dead end leaves the level graph."""
    if node == SINK:
        return limit
    for neighbour, room in residual[node].items():
        if room > 0 and levels.get(neighbour, -1) == levels[node] + 1:
            pushed = _augment(residual, levels, neighbour, min(limit, room))
            if pushed:
                residual[node][neighbour] -= pushed
                residual[neighbour][node] += pushed
                return pushed
    levels[node] = -1
    return 0.0


def _flow(before: Residual, after: Residual) -> Flow:
    """Read off the way back, which begins empty: a capacity less its rest would lose the digits of a small flow."""
    edges: dict[Edge, float] = {}
    for u, heads in before.items():
        for v in heads:
            used = after[v][u] - before[v][u]
            crosses = u == SOURCE or v == SINK or u // 2 != v // 2
            if crosses and used > 0:
                edges[u if u == SOURCE else u // 2, v if v == SINK else v // 2] = used
    return Flow(sum(flow for (tail, _), flow in edges.items() if tail == SOURCE), edges)
