"""Figure 1: the maximum flow of a placement of LLaMA-2-70B on Helix's clusters, tokens/s, next to a proven bound.

    python bench/placement.py [--time-limit 10] [--json FILE]

`Helix` is the published placement (Gurobi, 20 threads, 10 to 50 minutes), `Swarm` and `Petals` (with partial inference)
are those algorithms as Helix ran them, `SP` is one pipeline for each machine type; all are measured by the same
evaluator in this run. A dash: the model does not fit so. One thread; `seconds` is wall time, bound included.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.errors import InvalidArgument
from kvmesh.planner import catalogue, helix_files, problem
from kvmesh.planner.algorithms import place
from kvmesh.planner.evaluator import evaluate
from kvmesh.planner.world import Problem

MODEL, WORKLOAD = "llama2-70b", "azure-conv"
CLUSTERS = ("single24", "geo24", "het42")
COLUMNS = ("cluster", "Helix", "Swarm", "Petals", "SP", "kvmesh", "bound", "gap", "× Helix", "seconds")


@dataclass(frozen=True, slots=True)
class Result:
    """Flows in tokens/s; None where an algorithm has no placement."""

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


def baseline(name: str, task: Problem) -> float | None:
    try:
        return place(name, task).flow.value
    except InvalidArgument:
        return None


def measure(cluster: str, time_limit: float) -> Result:
    task = problem.build(catalogue.cluster(cluster), catalogue.model(MODEL), catalogue.workload(WORKLOAD))
    published = helix_files.read_placement(catalogue.HELIX / "placements" / f"{cluster}.ini")
    plan = place("helix", task, time_limit)
    return Result(
        cluster,
        evaluate(task, published).value,
        baseline("swarm", task),
        baseline("petals", task),
        baseline("separate", task),
        plan.flow.value,
        plan.bound,
        plan.seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds for each cluster")
    parser.add_argument("--json", type=Path, help="write the results")
    arguments = parser.parse_args()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        results = [measure(cluster, arguments.time_limit) for cluster in progress.track(CLUSTERS)]
    table = Table(*COLUMNS, title=f"max flow, {MODEL}, tokens/s", box=None)
    for result in results:
        table.add_row(*result.cells())
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
