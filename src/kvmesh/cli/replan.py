"""`kvmesh replan`: after drift or a lost host, who changes part and where requests go. `kvmesh.planner` decides."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvmesh.cli.planner import requested, task
from kvmesh.cli.render import duration, print_whole

if TYPE_CHECKING:
    from kvmesh.planner.replan import Replanned
    from kvmesh.planner.task import Task


def replan(
    plan: Annotated[Path, typer.Option(help="What `kvmesh plan --json` wrote.", exists=True, dir_okay=False)],
    lost: Annotated[list[str] | None, typer.Option(help="A host that is gone. Repeat for more.")] = None,
    observed: Annotated[
        Path | None, typer.Option(help="YAML: rate, input_tokens, output_tokens, lost, speeds.", exists=True)
    ] = None,
    time_limit: Annotated[float, typer.Option(min=0.01, help="Seconds.")] = 0.8,
    json: Annotated[Path | None, typer.Option(help="Write decisions and routes.")] = None,
) -> None:
    """Flip phases and reroute without moving weights; prints each worker's change of part and the routes' weights."""
    from kvmesh.planner import replan as replanning
    from kvmesh.planner.observed_file import ObservedSection, applied, host_numbers, read_observed
    from kvmesh.planner.plan_file import read_plan

    old = read_plan(plan)
    now = read_observed(observed) if observed else ObservedSection()
    before = _task(old.inputs)
    wanted = applied(before, now)
    gone = host_numbers(wanted.cluster, [*now.lost, *(lost or [])])
    groups, standby = old.placed(wanted.cluster), old.waiting(wanted.cluster)
    found = replanning.replan(wanted, groups, gone, time_limit, standby=standby)
    document = replanning.document(wanted, found)
    _print(wanted, document, found)
    if json:
        json.write_text(jsonlib.dumps(document, indent=1) + "\n")


def _task(inputs: Any) -> Task:
    from kvmesh.planner import catalogue

    bounds = inputs.slo_ttft_seconds, inputs.slo_tpot_seconds, inputs.slo_attainment
    work = requested(catalogue.workload(inputs.workload), inputs.rate, *bounds)
    cluster, watts = catalogue.cluster(inputs.cluster), inputs.power_budget
    return task(cluster, inputs.model, work, inputs.objective, inputs.kv_ratio, watts)


def _print(wanted: Task, document: dict[str, Any], found: Replanned) -> None:
    console = Console(highlight=False)
    table = Table("worker", "from", "to", box=None, pad_edge=False)
    for decision in document["decisions"]:
        table.add_row(decision["worker"], decision["from"], decision["to"])
    if document["decisions"]:
        print_whole(table)
    else:
        console.print("no worker changes its part")
    unit = "requests/s" if wanted.objective in ("flow", "goodput") else f"of the objective {wanted.objective}"
    console.print(
        f"\nserves {document['value']:.2f} {unit}, {document['value_before']:.2f} without a change ·"
        f" {len(document['routes'])} routes · {duration(found.seconds)}",
        soft_wrap=True,
    )
