"""Figure 5: goodput of disaggregation against the best tuned colocation, on equal engines, in the simulator.

    python bench/goodput.py [--traces DIR] [--case azure-code ...] [--seeds 2] [--requests 1000] [--json FILE]
    python bench/goodput.py --map FILE.png [--case azure-conv]            who wins where, over a grid of both objectives
    python bench/goodput.py --scale                                       how the cost of a simulation grows

Eight instances, OPT-13B on one A100-80G each with DistServe's published timings, Poisson arrivals, requests/s per GPU
at 90 % joint attainment, all seeds together. `prefill first` is scheduling before chunked prefill (vLLM before V1);
`chunked` takes the best of six token budgets, `split` the best of seven ways to divide the eight, `hybrid` the best of
a few of both. --traces names the folder of the public traces; without it only Helix's cuts of the Azure lengths, which
ship with kvmesh, are at hand.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.planner import catalogue
from kvmesh.planner.latency import DistServeLatency
from kvmesh.planner.simulator import Deployment, Instance, Links, Phase, simulate
from kvmesh.planner.simulator.goodput import attains, highest_rate
from kvmesh.planner.traces import endless, poisson
from kvmesh.planner.workload_file import read_lengths
from kvmesh.planner.world import Link
from kvmesh.scheduling.chunked import Chunked
from kvmesh.scheduling.distserve import DistServe
from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.hybrid import Hybrid
from kvmesh.scheduling.phases import Phases
from kvmesh.scheduling.policy import Policy, Slo
from kvmesh.scheduling.predictor import Profile
from kvmesh.types import Role

INSTANCES = 8
KV_TOKENS = 66_144
"""DistServe's own measurement for OPT-13B on one A100-80G."""
KV_BYTES = 819_200
WIDTH = 140
CANDIDATES = 8
"""Instances of each phase that the policy looks at where there are many."""
LINK = Link(200e9, 0.0)
ATTAINMENT = 0.9
BUDGETS = (512, 256, 1024, 128, 2048, 64)
WHOLE_PROMPTS, PREFILL_BUDGET = 8192, 2048
SPLITS = (4, 3, 5, 2, 6, 1, 7)
FIRST_GUESS, NEAR = 8.0, 1.25
"""Where a search begins that knows nothing, in requests/s; and its steps where it knows about where to look."""
SMALLEST_GAIN = 1.01
"""A setting that does not beat the best one by so much is not searched any further."""
FILES = {
    "azure-conv": "AzureLLMInferenceTrace_conv.csv",
    "azure-code": "AzureLLMInferenceTrace_code.csv",
    "sharegpt": "sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
    "arxiv": "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
}
CONTEXT = 2048
"""OPT's: lengths of ShareGPT and arXiv are cut to it, as DistServe does."""
MAP_TTFT, MAP_TPOT = (0.25, 0.5, 1.0, 2.0), (0.03, 0.04, 0.05, 0.07, 0.1)
GREEN, RED, BLUE, GREY = "#228833", "#ee6677", "#4477aa", "#bbbbbb"

Lengths = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Case:
    """Bounds in seconds; `aim`: the ratio of split to chunked that is to be reached at the tight one."""

    name: str
    ttft: float
    tight: float
    loose: float
    aim: float | None = None


CASES = (
    Case("sharegpt", 0.25, 0.05, 0.10),
    Case("azure-conv", 1.0, 0.05, 0.10, 1.1),
    Case("arxiv", 4.0, 0.035, 0.10, 1.15),
    Case("azure-code", 1.5, 0.05, 0.10, 1.5),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run the eight instances."""

    name: str
    deployment: Deployment
    policy: Callable[[], Policy]


@dataclass(frozen=True, slots=True)
class Best:
    """Of one system: requests/s per GPU, and the setting that gave them."""

    goodput: float
    setting: str


@cache
def latency() -> DistServeLatency:
    return catalogue.model("opt-13b").fits["A100-80G"]


def instances(name: str, phase: Phase, count: int, budget: int, prefill_first: bool = False) -> list[Instance]:
    return [
        Instance(f"{name}-{i}", phase, latency(), KV_TOKENS, budget, prefill_first=prefill_first) for i in range(count)
    ]


def deployment(machines: Sequence[Instance]) -> Deployment:
    return Deployment(machines, Links(LINK), KV_BYTES)


def prefill_first() -> Iterator[Setting]:
    machines = instances("mixed", Phase.MIXED, INSTANCES, WHOLE_PROMPTS, prefill_first=True)
    yield Setting("whole prompts", deployment(machines), Chunked)


def chunked() -> Iterator[Setting]:
    for budget in BUDGETS:
        yield Setting(str(budget), deployment(instances("mixed", Phase.MIXED, INSTANCES, budget)), Chunked)


def split() -> Iterator[Setting]:
    for prefill in SPLITS:
        machines = instances("prefill", Phase.PREFILL, prefill, PREFILL_BUDGET)
        machines += instances("decode", Phase.DECODE, INSTANCES - prefill, PREFILL_BUDGET)
        yield Setting(f"{prefill}P{INSTANCES - prefill}D", deployment(machines), DistServe)


def hybrid(best_split: str, best_budget: str) -> Iterator[Setting]:
    """Around what is best for the pure ones: fewer and more prefill instances, or all of them mixed."""
    middle, budget = int(best_split[0]), int(best_budget)
    for prefill in (0, *range(max(1, middle - 1), min(INSTANCES, middle + 2))):
        machines = instances("prefill", Phase.MIXED, prefill, PREFILL_BUDGET)
        machines += instances("decode", Phase.MIXED, INSTANCES - prefill, budget)
        planned = {one.name: Role.PREFILL if one.name.startswith("p") else Role.DECODE for one in machines}
        phases = Phases(planned if prefill else {})
        yield Setting(f"{prefill}P {budget}", deployment(machines), lambda phases=phases: make_hybrid(phases))  # type: ignore[misc]


def make_hybrid(phases: Phases) -> Policy:
    transfer = (LINK.seconds, KV_BYTES / LINK.bytes_per_s)
    return Hybrid(Fleet(usual=Profile(latency().prompt, latency().small, transfer, measured=True), phases=phases))


# Searching -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """One workload: its lengths, and how many requests of it with which seeds make a measurement."""

    lengths: Lengths
    requests: int
    seeds: int

    def best(self, settings: Iterator[Setting], slo: Slo, start: float, factor: float = NEAR) -> Best:
        """A setting is searched only if it is better than those before it: one run shows if it is not."""
        best = Best(0.0, "-")
        for setting in settings:
            found = best.goodput * INSTANCES
            if found and not self._good(setting, slo, found * SMALLEST_GAIN):
                continue

            def good(rate: float, setting: Setting = setting) -> bool:
                return self._good(setting, slo, rate)

            rate = highest_rate(good, found * SMALLEST_GAIN or start, factor=NEAR if found else factor)
            if rate > found:
                best = Best(rate / INSTANCES, setting.name)
        return best

    def _good(self, setting: Setting, slo: Slo, rate: float) -> bool:
        runs = [poisson(self.lengths, rate, self.requests, seed) for seed in range(self.seeds)]
        return attains(setting.deployment, setting.policy(), runs, slo, ATTAINMENT)

    def measure(self, slo: Slo, baseline: bool = True) -> dict[str, Best]:
        """Each system begins its search at the goodput of the one before it."""
        found: dict[str, Best] = {}
        if baseline:
            found["prefill first"] = self.best(prefill_first(), slo, FIRST_GUESS, factor=2.0)
        near = found["prefill first"].goodput * INSTANCES if baseline else 0.0
        found["chunked"] = self.best(chunked(), slo, near or FIRST_GUESS, NEAR if near else 2.0)
        near = found["chunked"].goodput * INSTANCES
        found["split"] = self.best(split(), slo, near or FIRST_GUESS, NEAR if near else 2.0)
        pure = max(found["split"], found["chunked"], key=lambda one: one.goodput)
        if not found["split"].goodput or not found["chunked"].goodput:
            return found | {"hybrid": pure}
        settings = hybrid(found["split"].setting, found["chunked"].setting)
        return found | {"hybrid": self.best(settings, slo, pure.goodput * INSTANCES)}


def lengths_of(name: str, folder: Path | None) -> Lengths | None:
    """None if the file is not at hand."""
    path = folder / FILES[name] if folder else None
    if path is None or not path.is_file():
        return catalogue.workload(name).sample() if name.startswith("azure") else None
    if name.startswith("azure"):
        return read_lengths(path)
    with path.open() as file:
        rows = [(int(float(r["num_prefill_tokens"])), int(float(r["num_decode_tokens"]))) for r in csv.DictReader(file)]
    return [(min(prompt, CONTEXT), max(1, min(output, CONTEXT))) for prompt, output in rows]


# What is printed -----------------------------------------------------------------------------------------------------


def table(cases: Sequence[Case], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    console = Console(width=WIDTH)
    shown = Table("lengths", "TTFT / TPOT (s)", "prefill first", "chunked", "split", "hybrid", "split ÷ chunked", "aim",
                  title="requests/s per GPU at 90 % joint attainment", box=None)  # fmt: skip
    results: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bounds = {"tight": ("tight",), "loose": ("loose",), "both": ("tight", "loose")}[arguments.tpot]
        jobs = [(case, getattr(case, bound)) for case in cases for bound in bounds]
        for case, tpot in progress.track(jobs, description="goodput"):
            lengths = lengths_of(case.name, arguments.traces)
            if lengths is None:
                console.print(f"{case.name}: left out, its lengths are not in --traces")
                continue
            found = Bench(lengths, arguments.requests, arguments.seeds).measure(Slo(case.ttft, tpot))
            ratio = found["split"].goodput / found["chunked"].goodput if found["chunked"].goodput else float("inf")
            cells = [f"{best.goodput:.2f} ({best.setting})" for best in found.values()]
            aim = f"≥ {case.aim}" if case.aim and tpot == case.tight else ""
            shown.add_row(case.name, f"{case.ttft:g} / {tpot:g}", *cells, f"{ratio:.2f}", aim)
            results.append(
                {"case": case.name, "ttft": case.ttft, "tpot": tpot, "ratio": ratio, "aim": aim}
                | {name: asdict(best) for name, best in found.items()}
            )
    console.print(shown)
    return results


def winners(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The same at every point of the grid, from loose to tight so that each starts near the answer."""
    lengths = lengths_of(case.name, arguments.traces)
    if lengths is None:
        raise SystemExit(f"the lengths of {case.name} are not in --traces")
    bench, cells = Bench(lengths, arguments.requests, arguments.seeds), []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        grid = [(ttft, tpot) for ttft in MAP_TTFT for tpot in MAP_TPOT]
        for ttft, tpot in progress.track(grid, description=f"{case.name}: grid"):
            found = bench.measure(Slo(ttft, tpot), baseline=False)
            cells.append({"ttft": ttft, "tpot": tpot} | {name: asdict(best) for name, best in found.items()})
    draw(cells, case.name, arguments.map)
    return cells


def draw(cells: Sequence[dict[str, Any]], name: str, path: Path) -> None:
    """Each cell: the winner of the pure ones by colour, by how much, and the hybrid relative to it."""
    figure = Figure(figsize=(1.6 * len(MAP_TPOT) + 1.5, 1.1 * len(MAP_TTFT) + 1.2), layout="constrained")
    axes = figure.subplots()
    for cell in cells:
        x, y = MAP_TPOT.index(cell["tpot"]), MAP_TTFT.index(cell["ttft"])
        values = {system: cell[system]["goodput"] for system in ("chunked", "split", "hybrid")}
        pure = max(values["chunked"], values["split"])
        ratio = values["split"] / values["chunked"] if values["chunked"] else float("inf")
        colour = GREY if not pure else BLUE if ratio > 1.02 else RED if ratio < 0.98 else GREY
        axes.add_patch(_square(x, y, colour))
        text = f"{ratio:.2f}×\nhybrid {values['hybrid'] / pure:.2f}" if pure else "out of\nreach"
        axes.text(x, y, text, ha="center", va="center", fontsize=9)
    axes.set(xlim=(-0.5, len(MAP_TPOT) - 0.5), ylim=(-0.5, len(MAP_TTFT) - 0.5), xlabel="TPOT (s)", ylabel="TTFT (s)")
    axes.set_xticks(range(len(MAP_TPOT)), map(str, MAP_TPOT))
    axes.set_yticks(range(len(MAP_TTFT)), map(str, MAP_TTFT))
    axes.set_title(f"{name}: split ÷ best chunked (blue: split wins), hybrid ÷ best of both", fontsize=10)
    figure.savefig(path, dpi=120)


def _square(x: int, y: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, alpha=0.5, edgecolor="white")


def scale() -> list[dict[str, Any]]:
    """The rate grows with the instances, so that the load of each stays the same."""
    shown = Table("instances", "requests", "seconds", "requests/s", "events/s", "tokens/s", "peak MiB", box=None)
    results = []
    lengths = catalogue.workload("azure-conv").sample()
    for machines, requests in ((8, 1000), (64, 8000), (512, 32_000), (1000, 50_000)):
        fleet = instances("p", Phase.PREFILL, 3 * machines // 8, PREFILL_BUDGET)
        fleet += instances("d", Phase.DECODE, 5 * machines // 8, PREFILL_BUDGET)
        began = time.process_time()
        outcome = simulate(
            deployment(fleet), endless(lengths, 1.9 * machines, requests), DistServe(), candidates=CANDIDATES
        )
        seconds = time.process_time() - began
        tokens = sum(one.prompt_tokens + one.output_tokens for one in outcome.requests)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row = (machines, requests, seconds, requests / seconds, outcome.events / seconds, tokens / seconds, peak)
        shown.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row))
        results.append(dict(zip(("instances", "requests", "seconds", "requests_per_s", "events_per_s", "tokens_per_s",
                                 "peak_mib"), row, strict=True)))  # fmt: skip
    Console().print(shown)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder with the lengths of ShareGPT and arXiv")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this one")
    parser.add_argument("--tpot", choices=["tight", "loose", "both"], default="both", help="which bound of each case")
    parser.add_argument("--requests", type=int, default=1000, help="of each seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--map", type=Path, help="draw who wins where for one case (.png, .svg)")
    parser.add_argument("--scale", action="store_true", help="measure the simulator itself")
    parser.add_argument("--json", type=Path, help="write the results")
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.case or case.name in arguments.case]
    if arguments.scale:
        results = scale()
    elif arguments.map:
        results = winners(cases[0], arguments)
    else:
        results = table(cases, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
