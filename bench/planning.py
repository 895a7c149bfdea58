"""Figures 6, 9 and 11: DistServe's placement against brute force, light against full replanning, plans in doubt.

    python bench/planning.py [--figures 6 9 11] [--accelerators 4] [--time-limit 10] [--json FILE]

6: every pair of shapes and every number of instances of both phases on one host of A100-80G, OPT-13B, by simulation;
   placements with less capacity than the best goodput found are not simulated: they cannot win.
9: a plan for the conversation trace meets other traffic, or loses a host. `stale` goes on with its old phases and new
   routes, `light` replans without moving weights, `full` plans anew with the same search, budget and another seed;
   where nothing changes, that shows what searching again is worth. Requests/s within the SLOs, estimated alike.
   Light seconds are of one core's time, so that other load on the machine does not count. `loading`: seconds that the
   links take for the layers that `full` puts where they are not.
11: throughputs of each kind of host are off by up to 25 and 50 %, drawn at random, forty times. Plans were made, and
   the minimax one chosen, on other draws. Routes are solved again for each draw; or a router re-balances them, round
   by round, by measured loads alone; or they keep their shares. Loss against the plan, of all that were compared, that
   is best under each draw: worst and mean.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.errors import InvalidArgument
from kvmesh.planner import catalogue
from kvmesh.planner import task as tasks
from kvmesh.planner.algorithms import arrange, kvmesh
from kvmesh.planner.groups.instances import fill, racks
from kvmesh.planner.groups.outcome import settle
from kvmesh.planner.groups.robust import Regret, cautious, compared, kept, rebalanced, truths
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.trial import simulated
from kvmesh.planner.observed_file import ObservedSection, applied
from kvmesh.planner.replan import replan
from kvmesh.planner.speeds import SpeedBook
from kvmesh.planner.task import Task
from kvmesh.planner.world import SINK, SOURCE, Cluster, Group, Host, Link, Phase, Plan, Slo

CODE = ObservedSection(input_tokens=1379, output_tokens=28)
HALF = ObservedSection(input_tokens=1050, output_tokens=134)
WORKLOADS = {"azure-conv": Slo(1.0, 0.05), "azure-code": Slo(1.5, 0.05)}
REPLANNED = (
    ("cloud42", "opt-13b", Slo(1.0, 0.05)),
    ("cloud32", "llama-30b", Slo(4.0, 0.15)),
    ("het42", "llama2-70b", Slo(8.0, 0.6)),
)
DOUBTED = (("het42", "llama2-70b", Slo(8.0, 0.6)), ("cloud32", "llama-30b", Slo(4.0, 0.15)))
DRAWS, HELD_OUT = 40, 1
AGAIN = 1
"""Seed of the full searches; the plan that they compete with has seed 0."""


def task(cluster: Cluster, model: str, workload: str, slo: Slo) -> Task:
    profile = catalogue.model(model)
    book = SpeedBook(profile, catalogue.accelerators())
    return tasks.build(cluster, profile, catalogue.workload(workload), slo, book)


def one_host(accelerators: int) -> Cluster:
    host = Host("host", f"A100-80Gx{accelerators}", 80e9 * accelerators, 25e9, "A100-80G", accelerators)
    return Cluster("one-host", (host,), {(SOURCE, 0): Link(25e9, 1e-5), (0, SINK): Link(25e9, 1e-5)})


# Figure 6 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """Simulated requests/s an accelerator within the SLOs, and seconds to find it."""

    workload: str
    method: str
    groups: str
    goodput: float
    of_best: float
    seconds: float


def every(estimator: Estimator) -> Iterator[tuple[Group, ...]]:
    """All numbers of instances of all shapes, one shape for each phase."""
    (rack,) = racks(estimator.task)
    room = rack.accelerators
    for prefill, decode in product(list(rack.shapes(room - 1)), repeat=2):
        for n in range(1, (room - decode.size) // prefill.size + 1):
            for m in range(1, (room - n * prefill.size) // decode.size + 1):
                wanted = [(prefill, Phase.PREFILL, n), (decode, Phase.DECODE, m)]
                groups = fill(estimator.task, rack.hosts, wanted)
                if len(groups) == n + m:
                    yield tuple(groups)


def brute_force(estimator: Estimator, tick: Callable[[], None]) -> tuple[tuple[Group, ...], float]:
    """The best by simulation; what cannot win by its capacity is left out."""
    most = Estimator(replace(estimator.task, objective="flow"))
    ranked = sorted(every(estimator), key=lambda groups: -estimator.route(groups).total)
    best: tuple[tuple[Group, ...], float] = ((), 0.0)
    for groups in ranked:
        if most.route(groups).total > best[1]:
            goodput = simulated(estimator, groups, start=max(0.1, estimator.route(groups).total))
            best = max(best, (groups, goodput), key=lambda pair: pair[1])
        tick()
    return best


def figure6(accelerators: int, progress: Progress) -> list[Placement]:
    results = []
    for workload, slo in WORKLOADS.items():
        wanted = task(one_host(accelerators), "opt-13b", workload, slo)
        estimator = Estimator(wanted)
        bar = progress.add_task(f"6: brute force, {workload}", total=sum(1 for _ in every(estimator)))
        began = time.perf_counter()
        groups, best = brute_force(estimator, lambda bar=bar: progress.advance(bar))  # type: ignore[misc]
        seconds = time.perf_counter() - began
        results.append(Placement(workload, "brute force", shapes(groups), best / accelerators, 1.0, seconds))
        for name in ("distserve-high", "distserve-low", "kvmesh"):
            plan, _ = arrange(name, wanted, 60.0)
            expected = plan.expected.goodput if plan.expected else 1.0
            goodput = simulated(estimator, plan.groups, start=expected)
            placed = goodput / accelerators, goodput / best, plan.seconds
            results.append(Placement(workload, name, shapes(plan.groups), *placed))
    return results


def shapes(groups: Sequence[Group]) -> str:
    """Such as '1P 1x1 + 3D 1x1'."""
    names = [f"{group.phase.value[0].upper()} {group.tensor}x{len(group.stages)}" for group in groups]
    return " + ".join(f"{names.count(name)}{name}" for name in dict.fromkeys(names))


# Figure 9 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replanning:
    cluster: str
    hosts: int
    change: str
    stale: float
    light: float
    full: float
    of_full: float
    light_seconds: float
    full_seconds: float
    loading: float
    """Seconds in which hosts load what `full` moves, each from the best-connected other host."""


def without(wanted: Task, lost: int) -> Task:
    """The cluster when the host is gone; hosts after it move up."""
    numbers = {old: old - (old > lost) for old in range(len(wanted.hosts)) if old != lost} | {
        SOURCE: SOURCE,
        SINK: SINK,
    }
    hosts = tuple(host for i, host in enumerate(wanted.hosts) if i != lost)
    links = {(numbers[u], numbers[v]): x for (u, v), x in wanted.cluster.links.items() if u in numbers and v in numbers}
    return replace(wanted, cluster=Cluster(wanted.cluster.name, hosts, links))


def searched(wanted: Task, time_limit: float, seed: int) -> Plan:
    """The best by estimate; a trial of the finalists would judge both sides of the comparison alike."""
    estimator, began = Estimator(wanted), time.perf_counter()
    best = kvmesh.finalists(estimator, time_limit, seed)[0]
    return settle("kvmesh", estimator, best.groups, time.perf_counter() - began, best.routing)[0]


def changes(wanted: Task) -> Iterator[tuple[str, Task, Task, tuple[int, ...]]]:
    """(name, the task as light replanning sees it, as the full search does, lost hosts)."""
    yield "nothing, searched again", wanted, wanted, ()
    yield "half conversation, half code", applied(wanted, HALF), applied(wanted, HALF), ()
    yield "conversation to code", applied(wanted, CODE), applied(wanted, CODE), ()
    hosts = range(len(wanted.hosts))
    for i in (hosts[0], hosts[len(hosts) // 4], hosts[len(hosts) // 2], hosts[-1]):
        yield f"lost {wanted.hosts[i].name} ({wanted.hosts[i].machine})", wanted, without(wanted, i), (i,)


def figure9(time_limit: float, progress: Progress) -> list[Replanning]:
    results = []
    for name, model, slo in REPLANNED:
        wanted = task(catalogue.cluster(name), model, "azure-conv", slo)
        plan = searched(wanted, time_limit, 0)
        for change, now, anew, gone in progress.track(list(changes(wanted)), description=f"9: {name}"):
            light = replan(now, plan.groups, gone, clock=time.process_time, standby=plan.standby)
            full = searched(anew, time_limit, AGAIN)
            best = full.expected.goodput if full.expected else 0.0
            value = light.value, best, light.value / best
            results.append(
                Replanning(
                    *(name, len(wanted.hosts), change, light.before, *value, light.seconds, full.seconds),
                    loading(anew, held(wanted, plan), held(anew, full)),
                )
            )
    return results


Held = dict[tuple[str, int], set[int]]
"""Layers on each accelerator, by host and number."""


def held(wanted: Task, plan: Plan) -> Held:
    shards = [shard for group in (*plan.groups, *plan.standby) for shard in group.shards]
    return {(wanted.hosts[s.host].name, number): set(range(*s.span)) for s in shards for number in s.accelerators}


def loading(wanted: Task, before: Held, after: Held) -> float:
    """Hosts load side by side, the layers that any of their accelerators had not held; tensor parallelism is left out,
    though it moves weights as well."""
    slowest = 0.0
    for number, host in enumerate(wanted.hosts):
        mine = [unit for unit in after if unit[0] == host.name]
        had = {layer for unit in before if unit[0] == host.name for layer in before[unit]}
        new = {layer for unit in mine for layer in after[unit]} - had
        links = (wanted.link(other, number) for other in range(len(wanted.hosts)) if other != number)
        speed = max((link.bytes_per_s for link in links if link), default=host.nic_bytes_per_s)
        slowest = max(slowest, len(new) * wanted.model.bytes_per_layer / speed)
    return slowest


# Figure 11 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Doubt:
    """Losses as shares of what the best of the same plans serves under the same draw."""

    cluster: str
    error: float
    routes: str
    plans: int
    nominal_worst: float
    minimax_worst: float
    nominal_mean: float
    minimax_mean: float
    price: float
    """What the minimax plan serves less where nothing is off."""


def doubts(name: str, wanted: Task, error: float, time_limit: float) -> Iterator[Doubt]:
    """Routes that follow what is true; and routes that keep their shares, the nominal ones or cautious ones."""
    found = kvmesh.finalists(Estimator(wanted), time_limit, 0, error)
    plans = [candidate.groups for candidate in found]
    drawn, held_out = (
        [Estimator(wanted), *map(Estimator, truths(wanted, error, DRAWS, seed))] for seed in (0, HELD_OUT)
    )
    weighed = [(one.groups, one.routing) for one in found]
    weighed += [(groups, shares) for groups in plans if (shares := cautious(drawn, groups)).rates]

    def followed(estimators: Sequence[Estimator]) -> Regret:
        return compared([[estimator.route(groups).value for groups in plans] for estimator in estimators])

    def stayed(estimators: Sequence[Estimator]) -> Regret:
        return compared([[kept(estimator, *plan) for plan in weighed] for estimator in estimators])

    def adapted(estimators: Sequence[Estimator]) -> Regret:
        return compared([[kept(e, plan[0], rebalanced(e, *plan)) for plan in weighed] for e in estimators])

    for routes, regret in (("solved again", followed), ("re-balanced", adapted), ("kept", stayed)):
        chosen, judged = regret(drawn).choice, regret(held_out)
        yield Doubt(
            cluster=name,
            error=error,
            routes=routes,
            plans=len(judged.worst),
            nominal_worst=judged.worst[0],
            minimax_worst=judged.worst[chosen],
            nominal_mean=mean_loss(judged.values, 0),
            minimax_mean=mean_loss(judged.values, chosen),
            price=1 - judged.values[0][chosen] / judged.values[0][0],
        )


def figure11(time_limit: float, progress: Progress) -> list[Doubt]:
    results: list[Doubt] = []
    for name, model, slo in progress.track(DOUBTED, description="11"):
        wanted = task(catalogue.cluster(name), model, "azure-conv", slo)
        for error in (0.25, 0.5):
            results += doubts(name, wanted, error, time_limit)
    return results


def mean_loss(values: Sequence[Sequence[float]], plan: int) -> float:
    return sum(1 - row[plan] / max(row) for row in values) / len(values)


FIGURES: dict[str, tuple[str, Callable[[argparse.Namespace, Progress], Sequence[Any]]]] = {
    "6": ("DistServe's placement, OPT-13B on one host of A100-80G", lambda a, p: figure6(a.accelerators, p)),
    "9": ("replanning", lambda a, p: figure9(a.time_limit, p)),
    "11": ("plans under errors of throughput", lambda a, p: figure11(a.time_limit, p)),
}


def show(title: str, results: Sequence[Any]) -> None:
    rows = [asdict(result) for result in results]
    table = Table(*(key.replace("_", " ") for key in rows[0]), title=title, box=None)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--accelerators", type=int, default=4, help="of figure 6")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds of each full search")
    parser.add_argument("--json", type=Path, help="write the results")
    arguments = parser.parse_args()
    found = {}
    for figure in arguments.figures:
        title, run = FIGURES[figure]
        with Progress(console=Console(stderr=True), transient=True) as progress:
            found[figure] = run(arguments, progress)
        show(f"figure {figure}: {title}", found[figure])
    if arguments.json:
        document = {figure: [asdict(result) for result in results] for figure, results in found.items()}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InvalidArgument as error:
        raise SystemExit(str(error)) from None
