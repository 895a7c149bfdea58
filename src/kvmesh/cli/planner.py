"""`kvmesh plan`: which host holds which layers and plays which part. The solving is `kvmesh.planner`'s."""

from __future__ import annotations

import json as jsonlib
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvmesh.cli.deploy import write_deployment
from kvmesh.cli.render import duration, notes, print_whole
from kvmesh.errors import InvalidArgument

if TYPE_CHECKING:
    from kvmesh.planner.task import Task
    from kvmesh.planner.world import Cluster, Plan, Problem, Slo, Workload

BAR_CELLS = 20
WATTS_IN_KILOWATT = 1e3
FLOW = "flow"


WorkloadName = Annotated[str, typer.Option(help="azure-conv, azure-code, or a file: .yaml, or .csv of lengths.")]
AlgorithmName = Annotated[
    str,
    typer.Option(
        help="Layers on hosts: helix, helix-milp, swarm, petals, separate. Groups with phases: kvmesh,"
        " thunderserve, distserve-high, distserve-low, splitwise."
    ),
]
ObjectiveName = Annotated[
    str | None, typer.Option(help="flow, goodput, cost or energy.", show_default="flow, or goodput of groups")
]
Rate = Annotated[float | None, typer.Option(min=0.0, help="Requests a second to serve; else as many as possible.")]
Attainment = Annotated[float | None, typer.Option(help="Share of requests that must meet both. [default: 0.9]")]
PowerBudget = Annotated[
    float | None, typer.Option(min=1.0, help="Watts that the hosts in use may draw; the others are off.")
]
CarbonBudget = Annotated[
    float | None, typer.Option(min=1.0, help="Grams of CO2 an hour, as a power budget; needs --carbon.")
]


def plan(
    cluster: Annotated[str, typer.Option(help="single24, geo24, het42, ..., or a file: .yaml, or Helix's .ini.")],
    model: Annotated[str, typer.Option(help="llama2-70b, llama-30b, opt-13b, opt-66b, or a profile file (.json).")],
    workload: WorkloadName = "azure-conv",
    algorithm: AlgorithmName = "helix",
    objective: ObjectiveName = None,
    rate: Rate = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Seconds between tokens.")] = None,
    attainment: Attainment = None,
    kv_ratio: Annotated[float, typer.Option(help="Bytes on the wire over bytes of KV: 0.25 with 4-bit codes.")] = 1.0,
    power_budget: PowerBudget = None,
    carbon: Annotated[float | None, typer.Option(min=0.0, help="Grams of CO2 for a kWh, to tell the plan's.")] = None,
    carbon_budget: CarbonBudget = None,
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds for the solver.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of random searches.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the plan.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the flow (.png, .svg, .pdf).")] = None,
    deploy: Annotated[Path | None, typer.Option(help="Write compose and Helm files into this folder.")] = None,
) -> None:
    """Place a model on unlike machines, and prove how far from the best the plan may be."""
    # Here, not above: the other commands run without numpy, HiGHS and matplotlib.
    from kvmesh.planner import algorithms, catalogue, problem, report

    if plot:
        from kvmesh.planner.drawing import check_suffix, draw

        check_suffix(plot)
    grouped = _grouped(algorithm)
    objective = objective or ("goodput" if grouped else FLOW)
    work = requested(catalogue.workload(workload), rate, slo_ttft, slo_tpot, attainment)
    hosts = catalogue.cluster(cluster)
    budget = _budget(power_budget, carbon, carbon_budget)
    with notes().status(f"{algorithm}: placing {model} on {len(hosts.hosts)} hosts"):
        if grouped:
            wanted = task(hosts, model, work, objective, kv_ratio, budget)
            found, nodes = algorithms.arrange(algorithm, wanted, time_limit, seed)
        else:
            _only_flow(algorithm, objective, budget or carbon)
            nodes = problem.build(hosts, catalogue.model(model), work)
            found = algorithms.place(algorithm, nodes, time_limit)
    print_whole(_table(nodes, found))
    Console(highlight=False).print("", *_totals(nodes, found, work, hosts, carbon), sep="\n", soft_wrap=True)
    inputs = _inputs(cluster, model, workload, objective, work) | {"kv_ratio": kv_ratio, "power_budget": budget}
    document = report.document(nodes, found, hosts, inputs)
    if json:
        json.write_text(jsonlib.dumps(document, indent=1) + "\n")
    if deploy:
        write_deployment(deploy, document, hosts.hosts, model, nodes.layers)
    if plot:
        draw(nodes, found, plot, f"{model} on {cluster}: {report.headline(found)}")


def _budget(watts: float | None, carbon: float | None, grams_per_hour: float | None) -> float | None:
    """Watts, the smaller of both budgets; None without one."""
    if grams_per_hour is None:
        return watts
    if not carbon:
        raise InvalidArgument("--carbon-budget needs --carbon, the grams of CO2 for a kWh")
    return min(watts or inf, grams_per_hour / carbon * WATTS_IN_KILOWATT)


def _grouped(algorithm: str) -> bool:
    """Whether it forms groups with phases."""
    from kvmesh.planner.algorithms import ALGORITHMS, ARRANGEMENTS

    if algorithm not in {*ALGORITHMS, *ARRANGEMENTS}:
        raise InvalidArgument(f"no algorithm {algorithm!r}: there are {', '.join([*ALGORITHMS, *ARRANGEMENTS])}")
    return algorithm in ARRANGEMENTS


def _only_flow(algorithm: str, objective: str, power: float | None) -> None:
    from kvmesh.planner.task import OBJECTIVES

    if objective not in OBJECTIVES:
        raise InvalidArgument(f"no objective {objective!r}: there are {', '.join(OBJECTIVES)}")
    if power is not None:
        raise InvalidArgument(f"{algorithm} knows no watts; for budgets of power or carbon take --algorithm kvmesh")
    if objective != FLOW:
        raise InvalidArgument(f"{algorithm} knows no objective but flow; for {objective} take --algorithm kvmesh")


def requested(
    workload: Workload, rate: float | None, ttft: float | None, tpot: float | None, attainment: float | None
) -> Workload:
    """The workload with what the command line says in place of its own."""
    from dataclasses import replace

    from kvmesh.planner.world import Slo

    own = workload.slo or Slo(inf, inf)
    slo = Slo(own.ttft if ttft is None else ttft, own.tpot if tpot is None else tpot, attainment or own.attainment)
    return replace(workload, rate=workload.rate if rate is None else rate, slo=slo)


def task(
    cluster: Cluster, model: str, workload: Workload, objective: str, kv_ratio: float, power_budget: float | None = None
) -> Task:
    """Raises InvalidArgument where SLOs are needed and not given, and for all that no plan could satisfy."""
    from kvmesh.planner import catalogue
    from kvmesh.planner import task as tasks
    from kvmesh.planner.speeds import SpeedBook

    profile, slo = catalogue.model(model), workload.slo
    assert slo is not None
    if objective != FLOW and max(slo.ttft, slo.tpot) == inf:
        raise InvalidArgument(
            f"the objective {objective} needs --slo-ttft and --slo-tpot, or a workload file with SLOs"
        )
    if objective == "cost" and not any(host.dollars_per_hour for host in cluster.hosts):
        raise InvalidArgument(f"the objective cost needs prices: no host of {cluster.name} has dollars_per_hour")
    book = SpeedBook(profile, catalogue.accelerators())
    budget = inf if power_budget is None else power_budget
    return tasks.build(cluster, profile, workload, slo, book, objective, kv_ratio, budget)


def _inputs(cluster: str, model: str, workload: str, objective: str, work: Workload) -> dict[str, Any]:
    """What `kvmesh replan` reads; files by their absolute paths."""
    names = {"cluster": cluster, "model": model, "workload": workload}
    files = {key: str(Path(name).resolve()) if Path(name).is_file() else name for key, name in names.items()}
    return {**files, "objective": objective, "rate": work.rate, **_bounds(work.slo)}


def _bounds(slo: Slo | None) -> dict[str, float | None]:
    assert slo is not None
    ttft, tpot = (None if seconds == inf else seconds for seconds in (slo.ttft, slo.tpot))
    return {"slo_ttft_seconds": ttft, "slo_tpot_seconds": tpot, "slo_attainment": slo.attainment}


def _table(problem: Problem, plan: Plan) -> Table:
    """One line a host; the bar is the share of its throughput in use."""
    from kvmesh.planner.report import rows

    names = ("phase", "host") if plan.groups else ("host",)
    table = Table(*names, "machine", "layers", "throughput", "flow", "in use", box=None, pad_edge=False)
    for column in table.columns[-4:-1]:
        column.justify = "right"
    for row in rows(problem, plan):
        bar = "█" * min(BAR_CELLS, round(BAR_CELLS * row.utilisation))
        spans = f"{row.span[0]}-{row.span[1] - 1}"
        cells = (row.machine, spans, f"{row.throughput:.1f}", f"{row.flow:.1f}", f"{bar:░<{BAR_CELLS}}")
        table.add_row(*((row.phase, row.host) if plan.groups else (row.host,)), *cells)
    return table


def _totals(
    problem: Problem, plan: Plan, workload: Workload, cluster: Cluster, carbon: float | None = None
) -> list[str]:
    decode = plan.flow.value * workload.decode_share
    used = {shard.host for group in plan.groups for shard in group.shards} or set(plan.placement)
    idle = len(cluster.hosts) - len(used)
    rest = f" · {idle} hosts idle" if idle else ""
    return [
        f"flow   {plan.flow.value:.1f} tokens/s, prompt and decode together (decode {decode:.1f})",
        f"bound  {plan.bound:.1f} tokens/s, proven · gap {plan.gap:.1%}",
        *(_expectations(plan, rest, carbon) if plan.expected else _room(problem, plan, workload, rest)),
        f"time   {duration(plan.seconds)} ({plan.algorithm})",
    ]


def _room(problem: Problem, plan: Plan, workload: Workload, rest: str) -> list[str]:
    from kvmesh.planner.report import kv_requests

    return [f"room   KV of {kv_requests(problem, plan.placement, workload):.0f} mean requests at once{rest}"]


def _expectations(plan: Plan, rest: str, carbon: float | None) -> list[str]:
    """Groups by shape and phase, then what they should give and draw."""
    assert plan.expected is not None
    expected = plan.expected
    shapes = [f"{g.phase} {g.tensor}x{len(g.stages)}" for g in plan.groups]
    counted = ", ".join(f"{shapes.count(shape)} {shape}" for shape in dict.fromkeys(shapes))
    price = f" · ${expected.dollars_per_hour:.2f}/h" if expected.dollars_per_hour else ""
    grams = expected.watts / WATTS_IN_KILOWATT * carbon if carbon else 0.0
    emitted = f" · {grams:.0f} g of CO2 an hour" if carbon else ""
    return [
        f"groups {counted} (tensor x pipeline){rest}",
        f"expect {expected.goodput:.2f} requests/s within the SLOs · mean TTFT {duration(expected.ttft)} · TPOT"
        f" {duration(expected.tpot)}",
        f"power  {expected.watts:.0f} W of the hosts in use · {expected.joules_per_token:.2f} J/token{emitted}{price}",
    ]
