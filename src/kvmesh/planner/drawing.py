"""Draws a plan: hosts as bars over their layers, coloured by machine type, joined by lines as wide as their flow.

KV that goes from one phase to the next is a dashed line.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kvmesh.errors import InvalidArgument
from kvmesh.planner.report import Row, phases, rows
from kvmesh.planner.world import Plan, Problem

SUFFIXES = (".png", ".svg", ".pdf")
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme: told apart by everyone."""
WIDEST = 5.0
BAR = 0.8


def check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise InvalidArgument(f"cannot draw {path}: the name must end in {', '.join(SUFFIXES)}")


def draw(problem: Problem, plan: Plan, path: Path, title: str) -> None:
    """Writes the picture; a bar's solid part is the share of its throughput in use."""
    bars = rows(problem, plan)
    figure = Figure(figsize=(11, 1.6 + 0.22 * len(bars)), layout="constrained")
    axes = figure.subplots()
    machines = list(dict.fromkeys(problem.machines))
    colours = {machine: COLOURS[i % len(COLOURS)] for i, machine in enumerate(machines)}
    for height, row in enumerate(bars):
        _bar(axes, height, row, colours[row.machine])
    _lines(axes, problem, plan, {row.host: height for height, row in enumerate(bars)})
    axes.set(title=title, xlabel="layer", xlim=(0, problem.layers), ylim=(len(bars) - 0.4, -0.6))
    labels = [f"{row.host} ({row.machine})" + (f", {row.phase}" if plan.groups else "") for row in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.legend(handles=[Patch(color=colours[m], label=m) for m in machines], loc="upper right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bar(axes: Axes, height: int, row: Row, colour: str) -> None:
    first, end = row.span
    axes.barh(height, end - first, BAR, left=first, color=colour, alpha=0.35)
    axes.barh(height, (end - first) * row.utilisation, BAR, left=first, color=colour)
    axes.annotate(f"{row.flow:.0f}", (first, height), (3, 0), textcoords="offset points", va="center", fontsize=6)


def _lines(axes: Axes, problem: Problem, plan: Plan, heights: dict[str, int]) -> None:
    parts = phases(plan)
    for (tail, head), flow in plan.flow.edges.items():
        if tail >= 0 and head >= 0:
            ends = plan.placement[tail][1], plan.placement[head][0]
            ys = heights[problem.hosts[tail]], heights[problem.hosts[head]]
            style = "solid" if parts[tail] == parts[head] else "dashed"
            width = 0.3 + WIDEST * flow / plan.flow.value
            axes.plot(ends, ys, color="black", alpha=0.4, linewidth=width, linestyle=style)
