"""Helix's placement as a compact MILP over layer boundaries, for clusters whose links do not bind.

Boundaries 0..L are nodes; an arc (kind, s → s + k) holds y machines and carries a flow of at most min(T(k), bound)·y;
flow is conserved at every boundary and Σ y <= machines of the kind. No host is named, so equal hosts bring no symmetry,
and no big-M is needed. Starts from a known placement and only ever improves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from kvmesh.planner.solver import Program, Solution
from kvmesh.planner.world import Problem, Span

Arc = tuple[int, int, int]
"""(kind, first layer, end layer)"""
LEAST_SECONDS = 0.5


class _Boundaries:
    """The program and its arcs: arc a has machines in column 2a and flow in column 2a + 1."""

    def __init__(self, problem: Problem, bound: float) -> None:
        self.tables = list(dict.fromkeys(table for table in problem.throughput if table))
        self.counts = Counter(problem.throughput)
        self.arcs: list[Arc] = []
        self.program = Program()
        layers, program = problem.layers, self.program
        machines = [program.row(upper=float(self.counts[table])) for table in self.tables]
        boundary = (
            program.row(-bound, 0.0),
            *(program.row(0.0, 0.0) for _ in range(layers - 1)),
            program.row(0.0, bound),
        )
        for kind, table in enumerate(self.tables):
            for k, rate in enumerate(table, 1):
                for first in range(layers - k + 1):
                    capacity = program.row(upper=0.0)
                    self.arcs.append((kind, first, first + k))
                    program.column({machines[kind]: 1.0, capacity: -min(rate, bound)}, integer=True)
                    out, into = boundary[first], boundary[first + k]
                    program.column({capacity: 1.0, out: -1.0, into: 1.0}, cost=0.0 if first else 1.0)

    def start(self, problem: Problem, placement: Mapping[int, Span], flow: float) -> list[float]:
        """A placement of aligned stages as values: the hosts of a stage share the flow by their throughputs."""
        held = Counter((self.tables.index(problem.throughput[host]), *span) for host, span in placement.items())
        total: dict[Span, float] = {}
        for (kind, first, end), number in held.items():
            total[first, end] = total.get((first, end), 0.0) + number * self.tables[kind][end - first - 1]
        values: list[float] = []
        for kind, first, end in self.arcs:
            number = held[kind, first, end]
            share = number * self.tables[kind][end - first - 1] / total[first, end] if number else 0.0
            values += [float(number), flow * share]
        return values

    def placement(self, problem: Problem, solution: Solution) -> dict[int, Span]:
        free = {table: [h for h, own in enumerate(problem.throughput) if own == table] for table in self.tables}
        spans: dict[int, Span] = {}
        for index, (kind, first, end) in enumerate(self.arcs):
            for _ in range(round(solution.values[2 * index])):
                spans[free[self.tables[kind]].pop()] = (first, end)
        return spans


def solve(problem: Problem, bound: float, seconds: float) -> tuple[dict[int, Span], float] | None:
    """The best placement found from nothing, and a proven bound (links left out)."""
    boundaries = _Boundaries(problem, bound)
    solution = boundaries.program.solve(seconds)
    return (boundaries.placement(problem, solution), solution.bound) if solution else None


def polish(
    problem: Problem, placement: Mapping[int, Span], flow: float, bound: float, seconds: float
) -> dict[int, Span] | None:
    """A placement at least as good as the given one of value `flow`, if the solver finds one in time."""
    if seconds < LEAST_SECONDS:
        return None
    boundaries = _Boundaries(problem, bound)
    solution = boundaries.program.solve(seconds, start=boundaries.start(problem, placement, flow))
    return boundaries.placement(problem, solution) if solution else None
