"""Figure 10: energy at equal SLO, and servers within a power budget, on the A100 power measured by Splitwise.

    python bench/energy.py [--trace AzureLLMInferenceTrace_conv.csv] [--off-idles] [--json FILE] [--plot FILE]
    python bench/energy.py --fit splitwise_perf_model.csv [--write FILE]

The load is a day in two hours: Poisson arrivals whose rate swings between 20 % and 100 % of the peak, with the lengths
of the trace (without one: lognormal lengths of the same medians and means). `always on` has every server at the full
clock and spreads requests evenly; it has as many servers as meet the SLO at the peak. `consolidated` switches servers
by the energy program once a minute, from the arrivals it has seen; a server takes a minute to start. `+ phases` gives
prompts and tokens servers of their own, `+ clocks` may also lock the clocks of those that decode. Evaluated iteration
by iteration by `kvmesh.planner.power.fleet`.

The second table is one row of servers, half of them with low-priority work, with more servers than the budget holds at
their rated power, the load growing with them: uncapped, and under POLCA's policy, whose caps show two seconds late.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.planner.power import fitting
from kvmesh.planner.power.control import Capping, Consolidating, SimulatedActuator
from kvmesh.planner.power.fleet import Controller, Nothing, Outcome, replay
from kvmesh.planner.power.instance import Instance, Request
from kvmesh.planner.power.points import Limits
from kvmesh.planner.power.profile import FULL, PowerProfile, profile
from kvmesh.scheduling.power import Level, PowerPolicy, Row

Lengths = Sequence[tuple[int, int]]
SEED = 0
DAY, TROUGH = 7200.0, 0.2
SERVERS = 16
MARGIN, SPLIT_MARGINS = 0.65, (0.45, 0.75)
"""Shares of the TPOT limit, and of both limits, that means may take."""
HEADROOM = 1.15
"""Times the rate seen, for bursts."""
ROW, ROW_SECONDS, ROW_TROUGH, DELAY = 20, 900.0, 0.5, 2.0
ADDED = (0.0, 0.3, 0.4, 0.5)
CLOCKS = (1305, 1110)


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds, and the requests/s of a server at the peak that keep it."""

    ttft: float
    tpot: float
    rate: float


SLOS = (Slo(1.0, 0.10, 1.0), Slo(2.0, 0.15, 1.9))
ROW_SLO = Slo(2.0, 0.15, 0.7)


@dataclass(frozen=True, slots=True)
class Saving:
    """One line of the first table."""

    slo: str
    system: str
    joules_per_token: float
    saved: float
    attainment: float
    servers_on: float
    requests: int


@dataclass(frozen=True, slots=True)
class Oversubscribed:
    """One line of the second; power as shares of the budget, losses in points of attainment against uncapped."""

    added: float
    peak_uncapped: float
    peak_capped: float
    over_seconds_uncapped: float
    over_seconds_capped: float
    attainment_uncapped: float
    attainment_capped: float
    loss: float
    high_loss: float
    low_loss: float
    braked: int


def lengths(trace: Path | None) -> Lengths:
    if trace:
        with trace.open() as file:
            return [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    generator = random.Random(SEED)
    return [(_lognormal(generator, 1020, 1155), _lognormal(generator, 129, 211)) for _ in range(20_000)]


def _lognormal(generator: random.Random, median: float, mean: float) -> int:
    return 1 + int(generator.lognormvariate(math.log(median), math.sqrt(2 * math.log(mean / median))))


def load(lengths: Lengths, peak: float, trough: float, seconds: float) -> list[Request]:
    return list(_arrivals(random.Random(SEED), lengths, peak, trough, seconds))


def _arrivals(
    generator: random.Random, lengths: Lengths, peak: float, trough: float, seconds: float
) -> Iterator[Request]:
    """Poisson, thinned to a rate that goes from the trough to the peak and back."""
    time = generator.expovariate(peak)
    while time < seconds:
        share = trough + (1 - trough) * (1 - math.cos(2 * math.pi * time / seconds)) / 2
        if generator.random() < share:
            yield Request(time, *generator.choice(lengths), generator.random() < 0.5)
        time += generator.expovariate(peak)


def savings(
    machine: PowerProfile, sizes: Lengths, asleep_watts: float, progress: Progress
) -> tuple[list[Saving], list[Outcome]]:
    rows: list[Saving] = []
    outcomes: list[Outcome] = []
    for slo in SLOS:
        found = {}
        for name, controller in _systems(machine, sizes, slo):
            fleet = [Instance(machine, asleep_watts=asleep_watts) for _ in range(SERVERS)]
            found[name] = _day(fleet, sizes, slo, name, controller, progress)
        baseline = found["always on"].joules_per_token
        rows += [_saving(slo, name, outcome, baseline) for name, outcome in found.items()]
        outcomes += found.values()
    return rows, outcomes


def _systems(machine: PowerProfile, sizes: Lengths, slo: Slo) -> list[tuple[str, Controller]]:
    prompt, output = (sum(column) / len(sizes) for column in zip(*sizes, strict=True))
    mixed = Limits(slo.ttft, slo.tpot * MARGIN)
    split = Limits(slo.ttft * SPLIT_MARGINS[0], slo.tpot * SPLIT_MARGINS[1])
    clocks = [FULL, *map(machine.locked, CLOCKS)]
    return [
        ("always on", Nothing()),
        ("consolidated", Consolidating(machine, prompt, output, mixed, headroom=HEADROOM)),
        ("+ phases", Consolidating(machine, prompt, output, split, headroom=HEADROOM, split=True)),
        ("+ clocks", Consolidating(machine, prompt, output, split, clocks, headroom=HEADROOM, split=True)),
    ]


def _day(
    fleet: Sequence[Instance], sizes: Lengths, slo: Slo, name: str, controller: Controller, progress: Progress
) -> Outcome:
    task = progress.add_task(f"TTFT {slo.ttft:g} s: {name}", total=DAY)
    requests = load(sizes, slo.rate * SERVERS, TROUGH, DAY)
    return replay(requests, fleet, controller, progress=lambda time: progress.update(task, completed=time))


def _saving(slo: Slo, name: str, outcome: Outcome, baseline: float) -> Saving:
    return Saving(
        slo=f"{slo.ttft:g} s / {slo.tpot:g} s",
        system=name,
        joules_per_token=outcome.joules_per_token,
        saved=1 - outcome.joules_per_token / baseline,
        attainment=outcome.attainment(slo.ttft, slo.tpot),
        servers_on=sum(reading.on for reading in outcome.readings) / len(outcome.readings),
        requests=len(outcome.requests),
    )


def row(machine: PowerProfile, sizes: Lengths, added: float) -> tuple[Oversubscribed, Outcome, Outcome]:
    """A row with `added` more servers than its budget was made for, without and with caps."""
    count = 2 * round(ROW * (1 + added) / 2)
    budget = ROW * machine.provisioned_watts
    requests = [load(sizes, ROW_SLO.rate * count, ROW_TROUGH, ROW_SECONDS) for _ in range(2)]
    fleets = [[Instance(machine, low_priority=number % 2 == 0) for number in range(count)] for _ in range(2)]
    actuator = SimulatedActuator(fleets[1], DELAY)
    low = frozenset(str(number) for number in range(0, count, 2))
    capping = Capping(Row(PowerPolicy(budget), actuator, low), actuator)
    free, held = replay(requests[0], fleets[0]), replay(requests[1], fleets[1], capping)
    return _oversubscribed(added, budget, free, held, capping.levels), free, held


def _oversubscribed(
    added: float, budget: float, free: Outcome, held: Outcome, levels: Sequence[Level]
) -> Oversubscribed:
    loss, high_loss, low_loss = (_attained(free, low) - _attained(held, low) for low in (None, False, True))
    peaks = [max(reading.total for reading in outcome.readings) / budget for outcome in (free, held)]
    over = [2.0 * sum(reading.total > budget for reading in outcome.readings) for outcome in (free, held)]
    return Oversubscribed(
        added=added,
        peak_uncapped=peaks[0],
        peak_capped=peaks[1],
        over_seconds_uncapped=over[0],
        over_seconds_capped=over[1],
        attainment_uncapped=_attained(free),
        attainment_capped=_attained(held),
        loss=loss,
        high_loss=high_loss,
        low_loss=low_loss,
        braked=levels.count(Level.BRAKE),
    )


def _attained(outcome: Outcome, low_priority: bool | None = None) -> float:
    return outcome.attainment(ROW_SLO.ttft, ROW_SLO.tpot, low_priority)


def fit_errors(table: Path, write: Path | None) -> None:
    """Fits the shipped profiles again, and prints the error on held-out settings."""
    runs = fitting.read_runs(table)
    printed = Table(
        "model", "TP", "prefill watts", "decode watts", title="mean error, 5-fold, held-out settings", box=None
    )
    for model, degree in sorted({(run.model, run.tensor_parallel) for run in runs if run.peak}):
        chosen = [r for r in runs if (r.hardware, r.model, r.tensor_parallel) == (fitting.MEASURED, model, degree)]
        found = fitting.fit(chosen)
        printed.add_row(model, str(degree), f"{found.prefill_error:.1%}", f"{found.decode_error:.1%}")
    Console().print(printed)
    if write:
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in fitting.entries(runs))
        write.write_text(f'{{"profiles": [\n{lines}\n]}}\n')


def show_savings(rows: Sequence[Saving]) -> None:
    table = Table(
        "TTFT / TPOT", "system", "J/token", "saved", "SLO met", "servers on", title="energy at equal SLO", box=None
    )
    for row in rows:
        saved = f"{row.saved:.0%}" if row.saved else "–"
        cells = (f"{row.joules_per_token:.2f}", saved, f"{row.attainment:.2%}", f"{row.servers_on:.1f}")
        table.add_row(row.slo, row.system, *cells)
    Console().print(table)


def show_row(rows: Sequence[Oversubscribed]) -> None:
    columns = ("servers", "peak", "capped", "s over budget", "capped", "SLO met", "capped", "loss", "high", "low")
    table = Table(*columns, title="servers within a power budget; shares of the budget, losses in points", box=None)
    for row in rows:
        table.add_row(
            f"{row.added:+.0%}",
            f"{row.peak_uncapped:.3f}",
            f"{row.peak_capped:.3f}",
            f"{row.over_seconds_uncapped:.0f}",
            f"{row.over_seconds_capped:.0f}",
            f"{row.attainment_uncapped:.2%}",
            f"{row.attainment_capped:.2%}",
            *(f"{100 * loss:.1f}" for loss in (row.loss, row.high_loss, row.low_loss)),
        )
    Console().print(table)


def plot(path: Path, days: Sequence[Outcome], free: Outcome, held: Outcome, budget: float) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6))
    for outcome, name in ((days[0], "always on"), (days[3], "phases and clocks")):
        readings = outcome.readings[::15]
        left.plot([r.time / 60 for r in readings], [r.total / 1e3 for r in readings], label=name)
    left.set(xlabel="minutes", ylabel="accelerator power, kW", ylim=(0, None), title="A day in two hours")
    for outcome, name in ((free, "uncapped"), (held, "POLCA")):
        right.plot([r.time / 60 for r in outcome.readings], [r.total / budget for r in outcome.readings], label=name)
    for share in (0.8, 0.89, 1.0):
        right.axhline(share, color="grey", linewidth=0.6, linestyle="--")
    right.set(xlabel="minutes", ylabel="share of the budget", title="30 % more servers than the budget holds")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="Azure conversation trace (CSV), for the lengths")
    parser.add_argument("--off-idles", action="store_true", help="servers that are off draw idle power, not none")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--plot", type=Path, help="draw power over time (.png, .svg)")
    parser.add_argument("--fit", type=Path, metavar="TABLE", help="only fit the power profiles to Splitwise's table")
    parser.add_argument("--write", type=Path, help="with --fit: write the profiles")
    arguments = parser.parse_args()
    if arguments.fit:
        fit_errors(arguments.fit, arguments.write)
        return
    sizes = lengths(arguments.trace)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        server = profile("A100-80G/llama2-70b/8")
        saved, days = savings(server, sizes, server.idle_watts if arguments.off_idles else 0.0, progress)
        machine = profile("A100-80G/bloom-176b/8")
        rows = [row(machine, sizes, added) for added in progress.track(ADDED, description="row")]
    show_savings(saved)
    show_row([result for result, _, _ in rows])
    if arguments.json:
        document = {"energy": [asdict(s) for s in saved], "budget": [asdict(result) for result, _, _ in rows]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.plot:
        plot(arguments.plot, days, rows[1][1], rows[1][2], ROW * machine.provisioned_watts)


if __name__ == "__main__":
    main()
