"""`kvmesh operate`: how many instances serve a load, at which clocks, for the least energy, cost or carbon.

The solving is `kvmesh.planner.power`'s.
"""

from __future__ import annotations

import json as jsonlib
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvmesh.cli.render import print_whole
from kvmesh.errors import InvalidArgument

if TYPE_CHECKING:
    from kvmesh.planner.power.operation import Demand, Operation

SHARES = (1.0, 0.93, 0.79)
"""Of the highest clock, to choose from."""


def operate(
    profile: Annotated[str, typer.Option(help="ACCELERATOR/MODEL/TENSOR-PARALLEL, as in H100-80G/llama2-70b/8.")],
    count: Annotated[int, typer.Option(min=1, help="Instances there are.")],
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second.")],
    workload: Annotated[str, typer.Option(help="azure-conv, azure-code, or a file, as in `plan`.")] = "azure-conv",
    objective: Annotated[str, typer.Option(help="energy, cost or carbon.")] = "energy",
    slo_ttft: Annotated[float, typer.Option(min=0.0, help="Seconds to the first token.")] = inf,
    slo_tpot: Annotated[float, typer.Option(min=0.0, help="Seconds between tokens.")] = inf,
    power_budget: Annotated[float, typer.Option(min=0.0, help="Watts that all instances may draw.")] = inf,
    carbon: Annotated[float, typer.Option(min=0.0, help="Grams of CO2 for a kWh.")] = 0.0,
    price: Annotated[float, typer.Option(min=0.0, help="Dollars for an hour of an instance.")] = 0.0,
    energy_price: Annotated[float, typer.Option(min=0.0, help="Dollars for a kWh.")] = 0.0,
    json: Annotated[Path | None, typer.Option(help="Write the answer.")] = None,
) -> None:
    """Choose which instances are on, and at which clocks, for a load."""
    # Here, not above: the other commands run without numpy and HiGHS.
    from kvmesh.planner import catalogue
    from kvmesh.planner.power import operation, points
    from kvmesh.planner.power.profile import FULL
    from kvmesh.planner.power.profile import profile as profile_named

    if objective not in {*operation.Aim}:
        raise InvalidArgument(f"no objective {objective!r}: there are {', '.join(operation.Aim)}")
    work, machine = catalogue.workload(workload), profile_named(profile)
    settings = [FULL if share == 1 else machine.locked(round(share * machine.clock_mhz)) for share in SHARES]
    choices = points.operating_points(machine, work.input_tokens, points.Limits(slo_ttft, slo_tpot), settings)
    demand = operation.Demand(rate * work.input_tokens, rate * work.output_tokens, slo_tpot)
    pool = operation.Pool(profile, count, choices, dollars_per_hour=price)
    prices = operation.Prices(energy_price, carbon)
    found = operation.operate([pool], demand, operation.Aim(objective), prices, power_budget)
    print_whole(_table(found))
    Console(highlight=False).print("", *_totals(found, demand, count), sep="\n", soft_wrap=True)
    if json:
        json.write_text(jsonlib.dumps(_document(found, demand), indent=1) + "\n")


def _table(found: Operation) -> Table:
    """One line for each operating point in use."""
    table = Table("on", "setting", "prompt tokens/s", "output tokens/s", "watts", box=None, pad_edge=False)
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for choice in found.choices:
        rates = (f"{choice.prompt_tokens:.0f}", f"{choice.output_tokens:.0f}", f"{choice.watts:.0f}")
        table.add_row(str(choice.on), choice.point.name, *rates)
    return table


def _totals(found: Operation, demand: Demand, count: int) -> list[str]:
    on = sum(found.on.values())
    lines = [
        f"on      {on} of {count} instances",
        f"power   {found.watts:.0f} W, {found.joules_per_token(demand):.2f} J for each output token",
    ]
    if found.dollars_per_hour:
        lines.append(f"cost    {found.dollars_per_hour:.2f} dollars an hour")
    if found.grams_per_hour:
        lines.append(f"carbon  {found.grams_per_hour:.0f} g of CO2 an hour")
    return lines


def _document(found: Operation, demand: Demand) -> dict[str, object]:
    return {
        "watts": found.watts,
        "joules_per_token": found.joules_per_token(demand),
        "dollars_per_hour": found.dollars_per_hour,
        "grams_per_hour": found.grams_per_hour,
        "objective": found.objective,
        "bound": found.bound,
        "on": [
            {
                "instances": choice.on,
                "setting": choice.point.name,
                "prompt_tokens_per_s": choice.prompt_tokens,
                "output_tokens_per_s": choice.output_tokens,
                "watts": choice.watts,
            }
            for choice in found.choices
        ],
    }
