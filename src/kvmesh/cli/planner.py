"""`kvmesh plan`: which host holds which layers, for the most tokens a second. The solving is `kvmesh.planner`'s."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvmesh.cli.render import duration, notes, print_whole
from kvmesh.errors import InvalidArgument

if TYPE_CHECKING:
    from kvmesh.planner.world import Plan, Problem, Workload

BAR_CELLS = 20
NUMBERS = ("layers", "throughput", "flow")


def plan(
    cluster: Annotated[str, typer.Option(help="single24, geo24, het42, ..., or a file: .yaml, or Helix's .ini.")],
    model: Annotated[str, typer.Option(help="llama2-70b, llama-30b, or a profile file (.json).")],
    workload: Annotated[str, typer.Option(help="azure-conv, azure-code, or a .csv of request lengths.")] = "azure-conv",
    algorithm: Annotated[str, typer.Option(help="helix, helix-milp, swarm, petals or separate.")] = "helix",
    objective: Annotated[str, typer.Option(help="What to maximise: flow, in tokens per second.")] = "flow",
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds for the solver.")] = 10.0,
    json: Annotated[Path | None, typer.Option(help="Write the plan.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the flow (.png, .svg, .pdf).")] = None,
) -> None:
    """Place a model's layers on unlike machines, and prove how far from the best the plan may be."""
    # Here, not above: the other commands run without numpy, HiGHS and matplotlib.
    from kvmesh.planner import catalogue, problem, report
    from kvmesh.planner.algorithms import OBJECTIVES, place

    if objective not in OBJECTIVES:
        raise InvalidArgument(f"no objective {objective!r}: there is {', '.join(OBJECTIVES)}")
    if plot:
        from kvmesh.planner.drawing import check_suffix, draw

        check_suffix(plot)
    work = catalogue.workload(workload)
    task = problem.build(catalogue.cluster(cluster), catalogue.model(model), work)
    with notes().status(f"{algorithm}: placing {model} on {len(task.hosts)} hosts"):
        found = place(algorithm, task, time_limit)
    print_whole(_table(task, found))
    _print_totals(task, found, work)
    if json:
        json.write_text(jsonlib.dumps(report.document(task, found), indent=1) + "\n")
    if plot:
        title = f"{model} on {cluster}: {found.flow.value:.0f} tokens/s ({algorithm}, bound {found.bound:.0f})"
        draw(task, found, plot, title)


def _table(problem: Problem, plan: Plan) -> Table:
    """One line a host; the bar is the share of its throughput in use."""
    from kvmesh.planner.report import rows

    table = Table("host", "machine", *NUMBERS, "in use", box=None, pad_edge=False)
    for column in table.columns[2:5]:
        column.justify = "right"
    for row in rows(problem, plan):
        bar = "█" * round(BAR_CELLS * row.utilisation)
        spans = f"{row.span[0]}-{row.span[1] - 1}"
        table.add_row(row.host, row.machine, spans, f"{row.throughput:.1f}", f"{row.flow:.1f}", f"{bar:░<{BAR_CELLS}}")
    return table


def _print_totals(problem: Problem, plan: Plan, workload: Workload) -> None:
    from kvmesh.planner.report import kv_requests

    decode = plan.flow.value * workload.decode_share
    room = kv_requests(problem, plan.placement, workload)
    idle = len(problem.hosts) - len(plan.placement)
    lines = (
        f"flow   {plan.flow.value:.1f} tokens/s, prompt and decode together (decode {decode:.1f})",
        f"bound  {plan.bound:.1f} tokens/s, proven · gap {plan.gap:.1%}",
        f"room   KV of {room:.0f} mean requests at once" + (f" · {idle} hosts idle" if idle else ""),
        f"time   {duration(plan.seconds)} ({plan.algorithm})",
    )
    Console(highlight=False).print("", *lines, sep="\n", soft_wrap=True)
