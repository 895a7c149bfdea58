"""A report as a table, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kvmesh.bench.statistics import OK, Record, Report, Slo

LATENCIES = {"TTFT": "ttft", "TPOT": "tpot", "ITL": "itl", "E2E": "e2e", "send lag": "send_lag"}


def latency_table(report: Report) -> Table:
    """Latencies in milliseconds."""
    columns = ("p50", "p90", "p99", "mean")
    table = Table("ms", *columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for title, name in LATENCIES.items():
        values: dict[str, float] = getattr(report, name)
        table.add_row(title, *(f"{values[column] * 1e3:.2f}" if values else "-" for column in columns))
    return table


def rates_lines(report: Report, slo: Slo) -> list[str]:
    """Throughput, what became of the requests, and goodput under the SLOs."""
    bad = {status: count for status, count in report.statuses.items() if status != OK}
    failures = ", ".join(f"{count} {status}" for status, count in sorted(bad.items())) or "none failed"
    bounds = {"TTFT": slo.ttft, "TPOT": slo.tpot}
    named = " and ".join(f"{name} <= {bound * 1e3:g} ms" for name, bound in bounds.items() if bound) or "no SLO"
    return [
        f"{report.requests} requests in {report.duration:.2f} s: {report.statuses.get(OK, 0)} served, {failures}",
        f"throughput: {report.request_rate:.2f} requests/s, {report.prompt_token_rate:.0f} prompt tokens/s, "
        f"{report.output_token_rate:.0f} output tokens/s, {report.cached_share:.0%} of prompt tokens cached",
        f"goodput under {named}: {report.goodput:.2f} requests/s, {report.attainment:.1%} attained "
        f"(TTFT {report.ttft_attainment:.1%}, TPOT {report.tpot_attainment:.1%})",
    ]


def plot_latencies(records: Sequence[Record], slo: Slo, path: Path) -> None:
    """Cumulative distributions of TTFT and TPOT, with the SLOs as lines; the format is the file's suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    served = [record for record in records if record.status == OK]
    panels: list[tuple[str, Callable[[Record], float | None], float | None]] = [
        ("time to first token (ms)", lambda record: record.ttft, slo.ttft),
        ("time per output token (ms)", lambda record: record.tpot, slo.tpot),
    ]
    for axes, (title, value, bound) in zip(figure.subplots(1, 2), panels, strict=True):
        _plot_distribution(axes, [v * 1e3 for record in served if (v := value(record)) is not None], len(records))
        if bound is not None:
            axes.axvline(bound * 1e3, linestyle="--", color="tab:red", label="SLO")
            axes.legend()
        axes.set(xlabel=title, ylabel="share of requests", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _plot_distribution(axes: Any, values: Sequence[float], requests: int) -> None:
    """Over all requests: the curve of a run with rejects ends below 1."""
    ordered = sorted(values)
    axes.step(ordered, [(rank + 1) / requests for rank in range(len(ordered))], where="post")
