"""Draws a simulation: distributions of both latencies with their bounds, and attainment over the rate."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvmesh.planner.simulator.outcome import Outcome
from kvmesh.planner.simulator.report import LATENCIES, Point
from kvmesh.scheduling.policy import Slo

TARGET = 0.9
LINES = {"TTFT": "ttft", "TPOT": "tpot", "both": "both"}


def draw(outcome: Outcome, slo: Slo, curve: Sequence[Point], path: Path, title: str) -> None:
    """Writes the picture; the format is the file's suffix."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    first, later, rates = figure.subplots(1, 3)
    for axes, name, bound in ((first, "TTFT", slo.ttft), (later, "TPOT", slo.tpot)):
        _distribution(axes, outcome, name, bound)
    for name, field in LINES.items():
        rates.plot([p.rate for p in curve], [getattr(p, field) for p in curve], marker="o", markersize=3, label=name)
    rates.axhline(TARGET, linestyle="--", color="tab:red", linewidth=1)
    rates.set(xlabel="requests/s", ylabel="attainment", ylim=(0, 1.02))
    rates.legend(fontsize=8)
    for axes in (first, later, rates):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def _distribution(axes: Axes, outcome: Outcome, name: str, bound: float) -> None:
    """Over all requests: the curve of a run with refusals ends below 1."""
    values = sorted(LATENCIES[name](request) for request in outcome.requests if request.finish < inf)
    axes.step(values, [(rank + 1) / len(outcome.requests) for rank in range(len(values))], where="post")
    if bound < inf:
        axes.axvline(bound, linestyle="--", color="tab:red", linewidth=1)
    axes.set(xlabel=f"{name} (s)", ylabel="share of requests", ylim=(0, 1.02))
