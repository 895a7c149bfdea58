"""Placement of LLaMA-2-70B on Helix's clusters: flow (1), simulated tokens (2, 3), request scheduling (4).

    python bench/placement.py [--figures 1 2 3 4] [--time-limit 10] [--json FILE]

1  maximum flow of a placement, tokens/s, next to a proven bound. `Helix` is the published placement (Gurobi, 20
   threads, 10 to 50 minutes), `Swarm` and `Petals` (with partial inference) are those algorithms as Helix ran them,
   `SP` is one pipeline for each machine type; all by the same evaluator. A dash: the model does not fit so.
2  simulated decode tokens/s and latencies, Helix's answer (published placement, its execution) against ours (our
   placement; prompts in chunks, decodes first and in bounded batches), offline and online; and what comes of placement
   alone, and of execution alone. Online, ours gets 1.5 times the arrivals.
3  our simulation of Helix's answer against what Helix published.
4  round-robin by flow and KV against random, Swarm's and shortest-queue scheduling, on Helix's placement and execution.
   As in Helix's runs, those three know no KV and get a fixed number of requests; `same masks`: random with our KV
   masks. `our weights`: round-robin by the flow that loads hosts and links evenly, in place of Helix's; the ratio is
   its.

The half-VRAM rule, profiles, links, KV room, lengths (Azure conversation) and seed are equal throughout. One thread;
`seconds` are wall time. Figures 2 to 4 take some minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.errors import InvalidArgument
from kvmesh.planner import catalogue, helix_files, problem
from kvmesh.planner.algorithms import place
from kvmesh.planner.bound import upper_bound
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.pipelines import runs
from kvmesh.planner.pipelines.execution import CHUNKED, HELIX, Execution
from kvmesh.planner.pipelines.outcome import Outcome
from kvmesh.planner.pipelines.ranking import candidates, rank
from kvmesh.planner.pipelines.simulation import Deployment
from kvmesh.planner.world import Problem
from kvmesh.scheduling.interleaved import Topology

MODEL, WORKLOAD = "llama2-70b", "azure-conv"
CLUSTERS = ("single24", "geo24", "het42")
PUBLISHED = {"single24": (252.1, 141.6), "geo24": (98.0, 59.3), "het42": (645.6, 459.8)}
"""Decode tokens/s of Helix's simulator, offline and online."""
ARRIVALS = {"single24": 700.0, "geo24": 320.0, "het42": 2150.0}
"""Tokens/s, prompt and output together, that Helix's online runs ask for."""
DENSER = 1.5
POPULATIONS = {"single24": 240, "geo24": 180}
"""Requests at once, in Helix's comparison of schedulers."""
PUBLISHED_SCHEDULERS = {"single24": "1.26", "geo24": "1.14"}
FINALISTS, SEARCH_SECONDS = 3, 60.0
"""Placements that are simulated before one is chosen, and what the search for all takes at most."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Flows:
    """Tokens/s; None where an algorithm has no placement."""

    cluster: str
    published: float
    swarm: float | None
    petals: float | None
    separate: float | None
    kvmesh: float
    bound: float
    seconds: float

    def cells(self) -> list[str]:
        flows = (self.published, self.swarm, self.petals, self.separate, self.kvmesh, self.bound)
        shown = ["–" if flow is None else f"{flow:.1f}" for flow in flows]
        gap, ratio = 1 - self.kvmesh / self.bound, self.kvmesh / self.published
        return [self.cluster, *shown, f"{max(gap, 0):.1%}", f"{ratio:.2f}", f"{self.seconds:.2f}"]


@dataclass(frozen=True, slots=True)
class Run:
    """Decode tokens/s, mean seconds of a prompt and of a decode step, and what the simulation cost."""

    tokens_per_s: float
    prompt_seconds: float
    decode_seconds: float
    finished: int
    events: int
    cpu_seconds: float

    @classmethod
    def of(cls, outcome: Outcome) -> Run:
        return cls(
            outcome.tokens_per_s,
            outcome.prompt_seconds,
            outcome.decode_seconds,
            outcome.finished,
            outcome.events,
            outcome.cpu_seconds,
        )

    def latency(self) -> str:
        return f"{self.prompt_seconds:.2f} / {self.decode_seconds:.2f}"


def baseline(name: str, task: Problem) -> float | None:
    try:
        return place(name, task).flow.value
    except InvalidArgument:
        return None


Placed = tuple[Deployment, Topology]


@cache
def published(cluster: str) -> Placed:
    """Helix's placement with the links and the flow of its own simulation."""
    path = catalogue.HELIX / "placements" / f"{cluster}.ini"
    deployment = Deployment(
        catalogue.cluster(cluster), catalogue.model(MODEL), task(cluster), helix_files.read_placement(path)
    )
    return deployment, deployment.topology(helix_files.read_flow(path))


@cache
def balanced(cluster: str) -> Placed:
    """Helix's placement with our flow: the one that loads hosts and links evenly."""
    deployment, _ = published(cluster)
    return deployment, deployment.topology()


@cache
def ours(cluster: str) -> Placed:
    """The best of our placements and weights: by estimate, then by short simulations with our execution."""
    options = candidates(task(cluster), upper_bound(task(cluster)), SEARCH_SECONDS)
    best = rank(published(cluster)[0], options, catalogue.workload(WORKLOAD), finalists=FINALISTS)[0]
    return best.deployment, best.topology


@cache
def task(cluster: str) -> Problem:
    return problem.build(catalogue.cluster(cluster), catalogue.model(MODEL), catalogue.workload(WORKLOAD))


def flows(cluster: str, time_limit: float) -> Flows:
    numbers, plan = task(cluster), place("helix", task(cluster), time_limit)
    helix = evaluate(numbers, published(cluster)[0].placement).value
    swarm, petals, separate = (baseline(name, numbers) for name in ("swarm", "petals", "separate"))
    return Flows(cluster, helix, swarm, petals, separate, plan.flow.value, plan.bound, plan.seconds)


@cache
def offline(
    cluster: str,
    placed: Callable[[str], Placed],
    execution: Execution,
    scheduler: str = "round-robin",
    population: int | None = None,
) -> Run:
    deployment, topology = placed(cluster)
    workload = catalogue.workload(WORKLOAD)
    return Run.of(runs.offline(deployment, topology, workload, execution, scheduler, population=population))


@cache
def online(cluster: str, placed: Callable[[str], Placed], execution: Execution, times: float = 1.0) -> Run:
    deployment, topology = placed(cluster)
    rate = times * ARRIVALS[cluster]
    return Run.of(runs.online(deployment, topology, catalogue.workload(WORKLOAD), rate, execution))


def figure_1(clusters: Iterable[str], time_limit: float) -> tuple[Table, Rows]:
    columns = ("cluster", "Helix", "Swarm", "Petals", "SP", "kvmesh", "bound", "gap", "× Helix", "seconds")
    table = Table(*columns, title=f"1: max flow, {MODEL}, tokens/s", box=None)
    results = [flows(cluster, time_limit) for cluster in clusters]
    for result in results:
        table.add_row(*result.cells())
    return table, [asdict(result) for result in results]


def figure_2(clusters: Iterable[str], time_limit: float) -> tuple[Table, Rows]:
    table = Table(
        *("cluster", "mode", "Helix", "our execution", "our placement", "kvmesh", "× Helix"),
        *("Helix: prompt / decode s", "kvmesh: prompt / decode s"),
        title="2: decode tokens/s: Helix's answer, our execution on its placement, our placement with its, both ours",
        box=None,
    )
    rows: Rows = []
    for cluster in clusters:
        pairs = [
            (
                "offline",
                offline(cluster, published, HELIX),
                offline(cluster, published, CHUNKED),
                offline(cluster, ours, HELIX),
                offline(cluster, ours, CHUNKED),
            ),
            ("online", online(cluster, published, HELIX), None, None, online(cluster, ours, CHUNKED, DENSER)),
        ]
        for mode, helix, execution, placement, both in pairs:
            alone = [f"{run.tokens_per_s:.1f}" if run else "–" for run in (execution, placement)]
            ratio = f"{both.tokens_per_s / helix.tokens_per_s:.2f}"
            speeds = [f"{helix.tokens_per_s:.1f}", *alone, f"{both.tokens_per_s:.1f}", ratio]
            table.add_row(cluster, mode, *speeds, helix.latency(), both.latency())
            named = {"helix": helix, "our_execution": execution, "our_placement": placement, "kvmesh": both}
            rows.append({"cluster": cluster, "mode": mode} | {k: asdict(v) for k, v in named.items() if v})
    return table, rows


def figure_3(clusters: Iterable[str], time_limit: float) -> tuple[Table, Rows]:
    columns = ("cluster", "mode", "published", "simulated", "error", "prompt / decode s", "events/s")
    table = Table(*columns, title="3: Helix's answer, decode tokens/s", box=None)
    rows: Rows = []
    for cluster in clusters:
        both = (("offline", offline(cluster, published, HELIX)), ("online", online(cluster, published, HELIX)))
        for (mode, run), known in zip(both, PUBLISHED[cluster], strict=True):
            error, speed = run.tokens_per_s / known - 1, run.events / run.cpu_seconds
            shown = f"{known:.1f}", f"{run.tokens_per_s:.1f}", f"{error:+.1%}", run.latency(), f"{speed:,.0f}"
            table.add_row(cluster, mode, *shown)
            rows.append({"cluster": cluster, "mode": mode, "published": known} | asdict(run))
    return table, rows


def figure_4(clusters: Iterable[str], time_limit: float) -> tuple[Table, Rows]:
    blind = ("random", "swarm", "shortest-queue")
    columns = ("cluster", "round-robin", "our weights", *blind, "× random", "published", "random, same masks")
    table = Table(*columns, title="4: decode tokens/s by request scheduler, Helix's placement, offline", box=None)
    rows: Rows = []
    for cluster in clusters:
        if cluster in POPULATIONS:
            known = offline(cluster, published, HELIX)
            results = {name: offline(cluster, published, HELIX, name, POPULATIONS[cluster]) for name in blind}
            masked = offline(cluster, published, HELIX, "random")
            even = offline(cluster, balanced, HELIX)
            ratio = even.tokens_per_s / results["random"].tokens_per_s
            speeds = [f"{run.tokens_per_s:.1f}" for run in (known, even, *results.values())]
            last = PUBLISHED_SCHEDULERS[cluster], f"{masked.tokens_per_s:.1f}"
            table.add_row(cluster, *speeds, f"{ratio:.2f}", *last)
            named = {"round-robin": known, "our weights": even, **results, "random, same masks": masked}
            rows.append({"cluster": cluster} | {name: asdict(run) for name, run in named.items()})
    return table, rows


FIGURES: dict[int, Callable[[Iterable[str], float], tuple[Table, Rows]]] = {
    1: figure_1,
    2: figure_2,
    3: figure_3,
    4: figure_4,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=int, nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--clusters", nargs="+", choices=CLUSTERS, default=list(CLUSTERS))
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds for each placement of figure 1")
    parser.add_argument("--json", type=Path, help="write the results")
    options = parser.parse_args(arguments)
    document: dict[str, Rows] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for figure in options.figures:
            steps = progress.track(options.clusters, description=f"figure {figure}")
            table, document[f"figure_{figure}"] = FIGURES[figure](steps, options.time_limit)
            Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
