"""No placement flows more than this: a proven bound in milliseconds, for any links, with or without partial inference.

Every layer must be held by hosts whose throughputs add up to the flow F. Give each machine type a price; a layer then
costs at least the cheapest set of hosts that carries F, where a host that spreads over k layers charges each of them a
k-th of its price. If all layers together cost more than all machines are worth, F is impossible.

`closed_form` prices a host at what it is worth alone: Σ_i max_k k·min(T_i(k), F) >= L·F. `upper_bound` finds the best
prices by column generation, over throughputs that are rounded up to a grid, so that it stays valid. Links are left out:
they only lower flows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.planner.solver import Program
from kvmesh.planner.world import SINK, SOURCE, Problem

UNITS = 1000
"""F in grid units: rounding up costs the bound less than hosts per layer / UNITS."""
TOLERANCE = 1e-4
MARGIN = 1e-7
MAX_COLUMNS = 500

Table = tuple[float, ...]


def closed_form(problem: Problem) -> float:
    """Largest F with Σ_i max_k k·min(T_i(k), F) >= L·F."""
    counts = Counter(problem.throughput)

    def possible(flow: float) -> bool:
        worth = sum(n * _worth(table, flow) for table, n in counts.items())
        return worth >= problem.layers * flow * (1 - MARGIN)

    return _largest(possible, _reach(problem), TOLERANCE * TOLERANCE)


def upper_bound(problem: Problem) -> float:
    """At most `closed_form`."""
    ceiling = closed_form(problem)
    if not ceiling:
        return 0.0
    counts = Counter(table for table in problem.throughput if table)
    tables = list(counts)
    numbers = np.array([counts[table] for table in tables], dtype=float)
    return min(ceiling, _largest(lambda flow: not _refuted(tables, numbers, problem.layers, flow), ceiling, TOLERANCE))


def _worth(table: Table, flow: float) -> float:
    return max((k * min(t, flow) for k, t in enumerate(table, 1)), default=0.0)


def _reach(problem: Problem) -> float:
    """Above this no flow can be: what the coordinator's links carry, or what all hosts give to one layer each."""
    ends = [sum(c for edge, c in problem.capacity.items() if end in edge) for end in (SOURCE, SINK)]
    return min(*ends, sum(max(table, default=0.0) for table in problem.throughput))


def _largest(possible: Callable[[float], bool], ceiling: float, tolerance: float) -> float:
    """Bisection from above: the answer is a flow that was refuted, or the ceiling."""
    if possible(ceiling):
        return ceiling
    low, high = 0.0, ceiling
    # The floor ends the search where no flow at all is possible.
    while high - low > tolerance * max(high, tolerance * ceiling):
        middle = (low + high) / 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return high


@dataclass(frozen=True, slots=True)
class _Choices:
    """Ways to help carry one layer: type `kinds[j]` spread over `spreads[j]` layers gives `units[j]` of UNITS."""

    kinds: npt.NDArray[np.int64]
    spreads: npt.NDArray[np.float64]
    units: npt.NDArray[np.int64]

    def cheapest(self, prices: npt.NDArray[np.float64]) -> tuple[float, Mapping[int, float]]:
        """The cheapest cover of a layer, by dynamic programming: its cost, and how much of each type it uses."""
        costs = prices[self.kinds] / self.spreads
        best, choice = np.zeros(UNITS + 1), np.zeros(UNITS + 1, dtype=np.int64)
        for need in range(1, UNITS + 1):
            totals = costs + best[np.maximum(0, need - self.units)]
            choice[need] = totals.argmin()
            best[need] = totals[choice[need]]
        used: dict[int, float] = {}
        need = UNITS
        while need > 0:
            j = choice[need]
            kind = int(self.kinds[j])
            used[kind] = used.get(kind, 0.0) + 1 / float(self.spreads[j])
            need = max(0, need - int(self.units[j]))
        return float(best[UNITS]), used


def _choices(tables: Sequence[Table], flow: float) -> _Choices:
    rows = [(kind, k, t) for kind, table in enumerate(tables) for k, t in enumerate(table, 1) if t > 0]
    units = np.array([np.ceil(min(t / flow, 1) * UNITS - MARGIN) for _, _, t in rows], dtype=np.int64)
    return _Choices(
        np.array([kind for kind, _, _ in rows]), np.array([k for _, k, _ in rows], dtype=float), np.maximum(units, 1)
    )


def _refuted(tables: Sequence[Table], numbers: npt.NDArray[np.float64], layers: int, flow: float) -> bool:
    """Whether some prices prove that `layers` layers cannot all carry `flow`."""
    choices = _choices(tables, flow)
    prices = np.array([_worth(table, flow) / flow for table in tables])
    master = Program()
    for number in numbers:
        master.row(upper=float(number))
    for _ in range(MAX_COLUMNS):
        cost, cover = choices.cheapest(prices)
        if prices @ numbers < layers * cost * (1 - MARGIN):
            return True
        master.column(cover, cost=1.0)
        solution = master.solve()
        if solution is None or solution.objective >= layers:
            return False
        prices = np.array(solution.duals)
    return False
