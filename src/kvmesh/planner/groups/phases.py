"""The best phase of every group at once, groups and weights as they are: an integer program over ThunderServe's routes.

    max Σ D_ij x_ij    Σ_j x_ij/μ_i + Σ_i x_ij/μ_j <= z_i    Σ_p z_gp <= 1    z in {0, 1}

i and j are pairs of a group and a phase p that it may have; z_gp says that group g has it. The transportation program
is the same with z given. Knows no time but the solver's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.solver import Program
from kvmesh.planner.world import Group, Phase

PHASES = tuple(Phase)
HALF = 0.5
"""A binary above it is one."""


def phased(estimator: Estimator, groups: Sequence[Group], seconds: float) -> tuple[Group, ...]:
    """A group that serves nothing keeps its phase, and so do all where nothing is found within `seconds`."""
    options = [replace(group, phase=phase) for group in groups for phase in PHASES]
    program = Program()
    only, times = [program.row(upper=1.0) for _ in groups], [program.row(upper=0.0) for _ in options]
    arriving = program.row(upper=inf if estimator.task.workload.rate is None else estimator.task.workload.rate)
    parts = [
        program.column({only[number // len(PHASES)]: 1.0, row: -1.0}, limit=1.0, integer=True)
        for number, row in enumerate(times)
    ]
    for pair, (link, chance) in estimator.pairs(options).items():
        loads = estimator.loads(options, pair)
        # Two options of one group exclude each other, so they need no route.
        if (pair[0] == pair[1] or pair[0] // len(PHASES) != pair[1] // len(PHASES)) and max(loads.values()) < inf:
            entries = {times[number]: time for number, time in loads.items()}
            program.column({arriving: 1.0, **entries}, cost=chance, limit=link)
    solution = program.solve(seconds)
    values = [solution.values[part] for part in parts] if solution else []
    chosen = {number // len(PHASES): options[number].phase for number, value in enumerate(values) if value > HALF}
    return tuple(replace(group, phase=chosen.get(number, group.phase)) for number, group in enumerate(groups))
