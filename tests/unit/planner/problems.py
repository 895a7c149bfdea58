"""Small problems, every placement of them, and where the research data lies, if it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

import pytest
from hypothesis import strategies as st

from kvmesh.planner.evaluator import evaluate, faults
from kvmesh.planner.world import SINK, SOURCE, Edge, Problem, Span

SHARED = Path(__file__).parents[4] / "shared" / "helix-data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/helix-data")

AMPLE = 1e9


def mesh(hosts: int, capacity: float = AMPLE) -> dict[Edge, float]:
    """Links between all, and of all with the coordinator."""
    inner = {(u, v): capacity for u in range(hosts) for v in range(hosts) if u != v}
    return inner | {(SOURCE, u): AMPLE for u in range(hosts)} | {(u, SINK): AMPLE for u in range(hosts)}


def make(layers: int, tables: list[tuple[float, ...]], links: Mapping[Edge, float] | None = None) -> Problem:
    return Problem(
        hosts=tuple(f"h{i}" for i in range(len(tables))),
        machines=tuple(f"m{tables.index(table)}" for table in tables),
        layers=layers,
        throughput=tuple(tables),
        kv_entries=tuple(tuple(1000 for _ in table) for table in tables),
        capacity=mesh(len(tables)) if links is None else links,
    )


def placements(problem: Problem) -> Iterator[dict[int, Span]]:
    """Every feasible placement, hosts left out included."""
    spans: list[list[Span | None]] = [
        [None, *((s, s + k) for k in range(1, problem.max_layers(h) + 1) for s in range(problem.layers - k + 1))]
        for h in range(len(problem.hosts))
    ]
    for chosen in product(*spans):
        placement = {host: span for host, span in enumerate(chosen) if span}
        if not list(faults(problem, placement)):
            yield placement


def best_flow(problem: Problem, partial: bool = False) -> float:
    """By trying them all."""
    return max((evaluate(problem, p, partial).value for p in placements(problem)), default=0.0)


@st.composite
def problems(draw: st.DrawFn, links: bool = False, max_hosts: int = 4) -> Problem:
    """At most `max_hosts` hosts of two kinds, at most four layers; throughput falls with the layers held."""
    layers = draw(st.integers(1, 4))
    rates = st.integers(1, 40).map(float)
    kinds = [tuple(draw(rates) / k for k in range(1, draw(st.integers(1, min(3, layers))) + 1)) for _ in range(2)]
    tables = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=max_hosts))
    if not links:
        return make(layers, tables)
    widths = st.sampled_from([0.0, 1.0, 5.0, 20.0, AMPLE])
    return make(layers, tables, {edge: draw(widths) for edge in mesh(len(tables))})
