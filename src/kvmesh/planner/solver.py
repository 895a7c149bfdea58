"""A mixed-integer program, built variable by variable and maximised by HiGHS on one thread. Knows nothing of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np

INFINITY = highspy.kHighsInf


@dataclass(frozen=True, slots=True)
class Solution:
    """The best values found, their objective, and a proven upper bound on any. `duals` belong to rows of an LP."""

    values: Sequence[float]
    objective: float
    bound: float
    duals: Sequence[float]


@dataclass(slots=True)
class Program:
    """max c·x subject to lower <= A x <= upper, 0 <= x <= limits, some x integer."""

    costs: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    integers: list[bool] = field(default_factory=list)
    rows: list[tuple[float, float]] = field(default_factory=list)
    entries: list[Mapping[int, float]] = field(default_factory=list)

    def row(self, lower: float = -INFINITY, upper: float = INFINITY) -> int:
        self.rows.append((lower, upper))
        return len(self.rows) - 1

    def column(
        self, entries: Mapping[int, float], cost: float = 0.0, limit: float = INFINITY, integer: bool = False
    ) -> int:
        """A variable, with its coefficients by row."""
        self.entries.append(entries)
        self.costs.append(cost)
        self.limits.append(limit)
        self.integers.append(integer)
        return len(self.costs) - 1

    def solve(self, time_limit: float = INFINITY, start: Sequence[float] | None = None) -> Solution | None:
        """The best found within `time_limit` seconds; None if there is none."""
        highs = highspy.Highs()  # type: ignore[no-untyped-call]
        options = {
            "output_flag": False,
            "threads": 1,
            "random_seed": 0,
            "time_limit": max(0.01, time_limit),
            "mip_rel_gap": 1e-6,
        }
        for name, value in options.items():
            highs.setOptionValue(name, value)
        highs.passModel(self._model())
        if start is not None:
            guess = highspy.HighsSolution()
            guess.col_value = list(start)
            highs.setSolution(guess)
        highs.run()
        return self._solution(highs)

    def _model(self) -> highspy.HighsLp:
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.costs), len(self.rows)
        lp.sense_ = highspy.ObjSense.kMaximize
        lp.col_cost_, lp.col_lower_ = np.array(self.costs), np.zeros(len(self.costs))
        lp.col_upper_ = np.array(self.limits)
        lp.row_lower_ = np.array([lower for lower, _ in self.rows])
        lp.row_upper_ = np.array([upper for _, upper in self.rows])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.cumsum([0, *(len(entries) for entries in self.entries)])
        lp.a_matrix_.index_ = np.array([row for entries in self.entries for row in entries], dtype=np.int32)
        lp.a_matrix_.value_ = np.array([value for entries in self.entries for value in entries.values()], dtype=float)
        if any(self.integers):
            kinds = highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger
            lp.integrality_ = [kinds[integer] for integer in self.integers]
        return lp

    def _solution(self, highs: highspy.Highs) -> Solution | None:
        info = highs.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        solution = highs.getSolution()
        bound = info.mip_dual_bound if any(self.integers) else info.objective_function_value
        return Solution(list(solution.col_value), info.objective_function_value, bound, list(solution.row_dual))
