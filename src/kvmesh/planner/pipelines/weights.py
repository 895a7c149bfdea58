"""Which share of the requests takes which hop: of all flows of one value, the one that loads hosts and links evenly.

A maximum flow is one of many and often drives some hosts to their limit while their peers idle. This one is the
cheapest under costs that grow with utilisation, piece by piece (a linear program). Knows no time and no requests.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.solver import Program
from kvmesh.planner.world import SINK, SOURCE, Edge, Problem, Span

PIECES = ((0.25, 1.0), (0.25, 2.0), (0.2, 4.0), (0.15, 8.0), (0.15, 16.0))
"""(share of the capacity, cost of a unit of it): a staircase below 1 / (1 - utilisation)."""
SPREAD = 0.01
"""Cost of links that nothing fills, to split flow over many hops."""
USED = 0.9
"""Of the maximum flow, so that there is a choice."""


def balanced(problem: Problem, placement: Mapping[int, Span]) -> dict[Edge, float]:
    """Tokens/s by hop."""
    value = USED * evaluate(problem, placement).value
    edges = [edge for edge in problem.capacity if joined(problem, placement, edge)]
    program = Program()
    kept = {host: program.row(0.0, 0.0) for host in placement}
    kept[SOURCE], kept[SINK] = program.row(value, value), program.row()
    loads = {host: program.row(0.0, 0.0) for host in placement}
    columns: list[int] = []
    for tail, head in edges:
        link = program.row(0.0, 0.0)
        entries = {kept[tail]: 1.0 if tail == SOURCE else -1.0, kept[head]: 1.0, link: 1.0}
        columns.append(program.column(entries | ({loads[head]: 1.0} if head in loads else {})))
        capacity = problem.capacity[tail, head]
        _staircase(program, link, min(capacity, value), 1.0 if capacity < value else SPREAD)
    for host, (first, end) in placement.items():
        _staircase(program, loads[host], problem.throughput[host][end - first - 1], 1.0)
    solution = program.solve()
    assert solution is not None, "a maximum flow exists, and so does this one"
    return {edge: max(0.0, solution.values[column]) for edge, column in zip(edges, columns, strict=True)}


def joined(problem: Problem, placement: Mapping[int, Span], edge: Edge) -> bool:
    """Whether the hop's head goes on where its tail ends."""
    tail, head = edge
    if not {tail, head} <= {SOURCE, SINK, *placement}:
        return False
    end = 0 if tail == SOURCE else placement[tail][1]
    return end == (problem.layers if head == SINK else placement[head][0])


def _staircase(program: Program, row: int, capacity: float, weight: float) -> None:
    """What the row carries costs more and more of the capacity it takes."""
    for share, cost in PIECES:
        program.column({row: -1.0}, cost=-weight * cost / capacity, limit=share * capacity)
