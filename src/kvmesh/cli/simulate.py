"""`kvmesh simulate`: how a deployment would serve a workload. The simulating is `kvmesh.planner.simulator`'s."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvmesh.cli.render import duration, notes, print_whole
from kvmesh.errors import InvalidArgument

if TYPE_CHECKING:
    from kvmesh.planner.simulator import Arrival, Deployment, Outcome
    from kvmesh.planner.simulator.report import Point
    from kvmesh.scheduling.policy import Policy, Slo

BAR_CELLS = 40
LOWEST, HIGHEST = 0.5, 2.0
"""Rates of the curve, relative to the one asked for."""
REFRESH = 50
"""Requests between two looks at the progress bar."""
QUANTILES = ("p50", "p90", "p99", "mean")


def simulate(
    deployment: Annotated[str | None, typer.Option(help="eight-a100, eight-a100-mixed, or a file (.yaml).")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="In place of a deployment: what `kvmesh plan --json` wrote.")
    ] = None,
    workload: Annotated[
        str,
        typer.Option(help="azure-conv, azure-code, lengths (.csv, .yaml), or a trace (Azure .csv, Mooncake .jsonl)."),
    ] = "azure-conv",
    rate: Annotated[float | None, typer.Option(min=1e-3, help="Requests per second. Default: a trace's own.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Default: 1000, or all of a trace.")] = None,
    slo: Annotated[str, typer.Option(help="Seconds, such as ttft=1,tpot=0.05.")] = "",
    policy: Annotated[
        str | None, typer.Option(help="As the router's: placement, distserve, splitwise, chunked, hybrid, …")
    ] = None,
    points: Annotated[int, typer.Option(min=0, help="Rates of the attainment curve; 0: none.")] = 8,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write everything, each request included.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latencies and attainment (.png, .svg, .pdf).")] = None,
) -> None:
    """Predict latencies, attainment and use of a deployment, with the mesh's own scheduler in modelled time."""
    # Here, not above: the other commands run without numpy, simpy and matplotlib.
    from kvmesh.planner.simulator import report
    from kvmesh.scheduling.policies import check_name

    if plot:
        from kvmesh.planner.drawing import check_suffix

        check_suffix(plot)
    bounds = parse_slo(slo)
    machines = _deployment(deployment, plan)
    chosen = check_name(policy) if policy else _usual_policy(machines)
    arrivals_at = _workload(workload, requests, seed, paced=rate is not None)
    first = arrivals_at(rate)
    asked = rate or len(first) / max(first[-1].at, 1e-9)
    run = _Runs(machines, chosen, bounds)
    outcome = run(f"{asked:.3g} requests/s", first)
    around = [asked * (LOWEST + (HIGHEST - LOWEST) * i / max(1, points - 1)) for i in range(points)]
    curve = [report.point(run(f"{one:.3g} requests/s", arrivals_at(one)), bounds, one) for one in around]
    _show(outcome, bounds, asked, chosen, curve)
    if json:
        json.write_text(jsonlib.dumps(report.document(outcome, bounds, asked, curve)) + "\n")
    if plot:
        from kvmesh.planner.simulator.drawing import draw

        draw(outcome, bounds, curve, plot, f"{deployment or plan}, {workload}, {asked:.3g} requests/s, {chosen}")


def parse_slo(text: str) -> Slo:
    """From 'ttft=1,tpot=0.05', seconds; either may be left out.

    Raises:
        InvalidArgument: it is not of that form; the message names the part.
    """
    from kvmesh.scheduling.policy import Slo

    bounds: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            bounds[name.strip()] = float(value)
        except ValueError:
            raise InvalidArgument(f"--slo: {part!r} is not of the form ttft=1 or tpot=0.05") from None
        if name.strip() not in ("ttft", "tpot") or not bounds[name.strip()] > 0:
            raise InvalidArgument(f"--slo: {part!r} is not a positive ttft or tpot")
    return Slo(**bounds)


def _deployment(name: str | None, plan: Path | None) -> Deployment:
    from kvmesh.planner.simulator.deployment_file import deployment
    from kvmesh.planner.simulator.plan_file import planned

    if (name is None) == (plan is None):
        raise InvalidArgument("name either a --deployment or a --plan")
    return planned(plan) if plan else deployment(str(name))


def _usual_policy(machines: Deployment) -> str:
    return "distserve" if any(one.phase.value == "prefill" for one in machines.instances) else "chunked"


def _workload(name: str, requests: int | None, seed: int, paced: bool) -> Callable[[float | None], Sequence[Arrival]]:
    """From a rate to arrivals."""
    from kvmesh.planner import catalogue, traces

    path = Path(name)
    if path.is_file() and traces.is_trace(path):
        return lambda rate: traces.replay(path, rate=rate, limit=requests, seed=seed)
    found = catalogue.workload(name)
    if not paced and found.rate is None:
        raise InvalidArgument(f"{name} does not say how many requests come: give --rate")
    return lambda rate: traces.poisson(found.sample(), rate or found.rate or 1.0, requests or 1000, seed)


class _Runs:
    """Simulations of one deployment, each with a policy of its own and a progress bar."""

    def __init__(self, machines: Deployment, policy: str, slo: Slo) -> None:
        self._machines, self._policy, self._slo = machines, policy, slo

    def __call__(self, label: str, arrivals: Sequence[Arrival]) -> Outcome:
        from kvmesh.planner.simulator import simulate

        with _progress(label, len(arrivals)) as progress:
            return simulate(self._machines, arrivals, self._make_policy(), slo=self._slo, progress=progress)

    def _make_policy(self) -> Policy:
        from kvmesh.planner.simulator.knowledge import profiled_fleet
        from kvmesh.scheduling.policies import make_policy

        return make_policy(self._policy, profiled_fleet(self._machines))


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = notes()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: None if done % REFRESH else progress.update(task, completed=done)


# What is printed -----------------------------------------------------------------------------------------------------


def _show(outcome: Outcome, slo: Slo, rate: float, policy: str, curve: Sequence[Point]) -> None:
    from kvmesh.planner.simulator import report

    console = Console(highlight=False)
    print_whole(_latency_table(outcome))
    console.print()
    print_whole(_instance_table(outcome))
    found, totals, count = report.point(outcome, slo, rate), report.totals(outcome), len(outcome.requests)
    lines = (
        f"served     {totals['requests_per_s']:.2f} requests/s, {totals['prompt_tokens_per_s']:.0f} prompt and "
        f"{totals['output_tokens_per_s']:.0f} output tokens/s, {totals['hit_share']:.0%} of prompts cached",
        f"attainment {found.both:.1%} of {count} requests (TTFT {found.ttft:.1%}, TPOT {found.tpot:.1%})",
        f"simulated  {duration(totals['simulated_seconds'])} in {duration(totals['seconds'])} ({policy})",
        *(f"refused    {refused}: {reason}" for reason, refused in report.refusals(outcome).items()),
    )
    console.print("", *lines, sep="\n", soft_wrap=True)
    if curve:
        console.print()
        print_whole(_curve_table(curve))


def _latency_table(outcome: Outcome) -> Table:
    from kvmesh.planner.simulator.report import latencies

    table = Table("seconds", *QUANTILES, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in latencies(outcome).items():
        table.add_row(name, *(f"{values[quantile]:.4g}" if values else "-" for quantile in QUANTILES))
    return table


def _instance_table(outcome: Outcome) -> Table:
    from kvmesh.planner.simulator.report import duration as length

    headings = ("instance", "busy", "iterations", "mean batch", "prompt tokens", "output tokens", "peak KV")
    table = Table(*headings, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    seconds = max(length(outcome), 1e-9)
    for one in outcome.instances:
        busy, batch = one.busy / seconds, one.batch_seconds / max(one.busy, 1e-9)
        counts = (str(one.iterations), f"{batch:.1f}", str(one.prompt_tokens), str(one.output_tokens))
        table.add_row(one.name, f"{busy:.0%}", *counts, f"{one.peak_blocks / one.blocks:.0%}")
    return table


def _curve_table(curve: Sequence[Point]) -> Table:
    """The bar is the share that meets both objectives."""
    table = Table("requests/s", "TTFT", "TPOT", "both", "", box=None, pad_edge=False)
    for column in table.columns[:4]:
        column.justify = "right"
    for one in curve:
        bar = "█" * round(BAR_CELLS * one.both)
        table.add_row(f"{one.rate:.3g}", *(f"{v:.1%}" for v in (one.ttft, one.tpot, one.both)), f"{bar:░<{BAR_CELLS}}")
    return table
