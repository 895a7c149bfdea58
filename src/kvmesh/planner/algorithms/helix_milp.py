"""Helix's own MILP (ASPLOS 2025, section 4.3, no partial inference), for comparison on small clusters.

Every host has a start s_i and binaries b_ik for the number of layers it holds; every link a flow and a binary d that
says whether it joins matching layers. Kept as published, except that a link's capacity is cut to what its two ends can
handle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvmesh.errors import InvalidArgument
from kvmesh.planner.evaluator import faults
from kvmesh.planner.solver import Program
from kvmesh.planner.world import SINK, SOURCE, Edge, Problem, Span


def place(problem: Problem, bound: float, seconds: float) -> Mapping[int, Span]:
    formulation = _Formulation(problem)
    solution = formulation.program.solve(seconds)
    spans = formulation.spans(solution.values) if solution else {}
    # The solver's first answer is a flow of nothing through hosts that need not hold every layer.
    if any(faults(problem, spans)):
        raise InvalidArgument(f"helix-milp found no placement in {seconds:.0f} s; helix needs much less")
    return spans


class _Formulation:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.program = problem, Program()
        self.hosts = [host for host, table in enumerate(problem.throughput) if table]
        self.conserved = {host: self.program.row(0.0, 0.0) for host in self.hosts}
        self.busy = {host: self.program.row(upper=0.0) for host in self.hosts}
        # Rows over (s_i, e_i): filled by the links, then closed by the columns of each host.
        self.starts: dict[int, dict[int, float]] = {host: {} for host in self.hosts}
        self.ends: dict[int, dict[int, float]] = {host: {} for host in self.hosts}
        for edge, capacity in problem.capacity.items():
            if all(end in self.conserved or end < 0 for end in edge):
                self._link(edge, capacity)
        self.columns = {host: self._host(host) for host in self.hosts}

    def _link(self, edge: Edge, capacity: float) -> None:
        """f <= capacity·d, and what d = 1 demands of the two ends."""
        tail, head = edge
        layers = float(self.problem.layers)
        usable = min(capacity, *(max(self.problem.throughput[end]) for end in edge if end >= 0))
        carried = self.program.row(upper=0.0)
        valid = {carried: -usable}
        if tail == SOURCE:
            # s_j <= L (1 - d)
            row = self.program.row(upper=layers)
            self.starts[head][row], valid[row] = 1.0, layers
        elif head == SINK:
            # L d <= e_i
            row = self.program.row(upper=0.0)
            self.ends[tail][row], valid[row] = -1.0, layers
        else:
            # L d <= L ± (s_j - e_i)
            for sign in (1.0, -1.0):
                row = self.program.row(upper=layers)
                self.starts[head][row], self.ends[tail][row], valid[row] = sign, -sign, layers
        flow = {carried: 1.0}
        if tail >= 0:
            flow[self.conserved[tail]] = -1.0
        if head >= 0:
            flow |= {self.conserved[head]: 1.0, self.busy[head]: 1.0}
        self.program.column(flow, cost=1.0 if tail == SOURCE else 0.0)
        self.program.column(valid, limit=1.0, integer=True)

    def _host(self, host: int) -> tuple[int, list[int]]:
        """Columns s_i and b_i1, b_i2, ...: e_i = s_i + Σ k b_ik <= L, Σ b_ik = 1, flow <= Σ T(k) b_ik."""
        layers = float(self.problem.layers)
        one, fits = self.program.row(1.0, 1.0), self.program.row(upper=layers)
        starts, ends = self.starts[host], self.ends[host]
        both = {row: starts.get(row, 0.0) + ends.get(row, 0.0) for row in [*starts, *ends]}
        first = self.program.column({**both, fits: 1.0}, limit=layers - 1, integer=True)
        held = [
            self.program.column(
                {**{row: k * c for row, c in ends.items()}, fits: k, one: 1.0, self.busy[host]: -rate},
                limit=1.0,
                integer=True,
            )
            for k, rate in enumerate(self.problem.throughput[host], 1)
        ]
        return first, held

    def spans(self, values: Sequence[float]) -> dict[int, Span]:
        spans = {}
        for host, (first, held) in self.columns.items():
            size = 1 + max(range(len(held)), key=lambda k: values[held[k]])
            spans[host] = (round(values[first]), round(values[first]) + size)
        return spans
