"""Figure 5: goodput of disaggregation against the best tuned colocation, on equal engines, in the simulator.

    python bench/goodput.py [--traces DIR] [--case azure-code ...] [--seeds 2] [--requests 1000] [--json FILE]
    python bench/goodput.py --map FILE.png [--case azure-conv]            who wins where, over a grid of both objectives
    python bench/goodput.py --scale [1000x1000000 ...]       how the cost of a simulation grows: instances x requests

Eight instances, OPT-13B on one A100-80G each with DistServe's published timings, Poisson arrivals, requests/s per GPU
at 90 % joint attainment, all seeds together. `prefill first` is scheduling before chunked prefill (vLLM before V1);
`chunked` takes the best of six token budgets, `split` the best of seven ways to divide the eight, `hybrid` the best of
four: as many workers compute prompts for others as in that split, one or two fewer, or none. --traces names the folder
of the public traces; without it only Helix's cuts of the Azure lengths, which ship with kvmesh, are at hand.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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
SIZES = ("8x1000", "64x8000", "512x32000", "1000x50000")
LINK = Link(200e9, 0.0)
ATTAINMENT = 0.9
BUDGETS = (512, 256, 1024, 128, 2048, 64)
WHOLE_PROMPTS, PREFILL_BUDGET = 8192, 2048
SPLITS = (4, 3, 5, 2, 6, 1, 7)
FEWER = (1, 0, 2)
"""Workers that compute prompts apart under the hybrid policy, fewer than are best for a split."""
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
"""OPT's."""
MAP_TTFT, MAP_TPOT = (0.5, 0.7, 1.0, 2.0), (0.03, 0.04, 0.05, 0.07, 0.1)
COLOURS = {"split": "#4477aa", "chunked": "#ee6677", "level": "#bbbbbb"}
LEVEL = 1.02
"""Two are level if neither is better by more."""

Lengths = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Case:
    """Bounds in seconds; `aim`: the ratio of split to chunked that is to be reached at the tight one."""

    name: str
    ttft: float
    tight: float
    middle: float
    loose: float
    aim: float | None = None


CASES = (
    Case("sharegpt", 0.25, 0.05, 0.07, 0.10),
    Case("azure-conv", 1.0, 0.05, 0.07, 0.10, 1.1),
    Case("arxiv", 4.0, 0.035, 0.05, 0.10, 1.15),
    Case("azure-code", 1.5, 0.05, 0.07, 0.10, 1.5),
)
BOUNDS = ("tight", "middle", "loose")


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
    fitted = catalogue.model("opt-13b").fits["A100-80G"]
    assert isinstance(fitted, DistServeLatency)
    return fitted


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


def hybrid(best_split: str) -> Iterator[Setting]:
    """Who computes prompts for others: fewer than in the best split, for decode workers help, or nobody.

    Chunks are large everywhere, for the policy itself sees to the time per token.
    """
    counts = [int(best_split[0]) - fewer for fewer in FEWER]
    for prefill in (*(count for count in counts if count > 0), 0):
        machines = instances("prefill", Phase.MIXED, prefill, PREFILL_BUDGET)
        machines += instances("decode", Phase.MIXED, INSTANCES - prefill, PREFILL_BUDGET)
        planned = {one.name: Role.PREFILL if one.name.startswith("p") else Role.DECODE for one in machines}
        phases = Phases(planned if prefill else {})
        yield Setting(f"{prefill}P{INSTANCES - prefill}D", deployment(machines), partial(make_hybrid, phases))


def make_hybrid(phases: Phases) -> Policy:
    transfer = (LINK.seconds, KV_BYTES / LINK.bytes_per_s)
    return Hybrid(Fleet(usual=Profile(latency().prompt, latency().small, transfer, measured=True), phases=phases))


# Searching -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """One workload: its lengths, and how many requests of it with which seeds make a measurement.

    `found`: what was best for each system when last measured, where the next search begins.
    """

    lengths: Lengths
    requests: int
    seeds: int
    found: dict[str, Best] = field(default_factory=dict)

    def best(self, system: str, settings: Iterator[Setting], slo: Slo, start: float = 0.0) -> Best:
        """A setting is searched only if it is better than those before it: one run shows if it is not."""
        last, best = self.found.get(system, Best(0.0, "-")), Best(0.0, "-")
        start = start or last.goodput * INSTANCES
        factor, start = (NEAR, start) if start else (2.0, FIRST_GUESS)
        for setting in sorted(settings, key=lambda one: one.name != last.setting):
            found = best.goodput * INSTANCES
            if found and not self._good(setting, slo, found * SMALLEST_GAIN):
                continue

            def good(rate: float, setting: Setting = setting) -> bool:
                return self._good(setting, slo, rate)

            rate = highest_rate(good, found * SMALLEST_GAIN or start, factor=NEAR if found else factor)
            if rate > found:
                best = Best(rate / INSTANCES, setting.name)
        self.found[system] = best
        return best

    def _good(self, setting: Setting, slo: Slo, rate: float) -> bool:
        runs = [poisson(self.lengths, rate, self.requests, seed) for seed in range(self.seeds)]
        return attains(setting.deployment, setting.policy(), runs, slo, ATTAINMENT)

    def measure(self, slo: Slo, baseline: bool = True) -> dict[str, Best]:
        """The hybrid begins its search at the goodput of the better pure one."""
        found = {"prefill first": self.best("prefill first", prefill_first(), slo)} if baseline else {}
        found["chunked"] = self.best("chunked", chunked(), slo)
        found["split"] = self.best("split", split(), slo)
        settings = hybrid(found["split"].setting if found["split"].goodput else "4")
        return found | {"hybrid": self.best("hybrid", settings, slo, pure(found) * INSTANCES)}


def pure(found: Mapping[str, Best]) -> float:
    """Goodput of the better one of split and chunked."""
    return max(found["split"].goodput, found["chunked"].goodput)


def ratio(value: float, base: float) -> float:
    return value / base if base else float("inf") if value else 1.0


def lengths_of(name: str, folder: Path | None) -> Lengths | None:
    """None if the file is not at hand. As DistServe does: conversations beyond the context are left out, papers cut."""
    path = folder / FILES[name] if folder else None
    if path is None or not path.is_file():
        return catalogue.workload(name).sample() if name.startswith("azure") else None
    lengths = read_lengths(path)
    if name.startswith("azure"):
        return lengths
    if name == "sharegpt":
        return [(prompt, output) for prompt, output in lengths if prompt + output <= CONTEXT]
    return [(min(prompt, CONTEXT), max(1, min(output, CONTEXT))) for prompt, output in lengths]


# What is printed -----------------------------------------------------------------------------------------------------


def table(cases: Sequence[Case], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    console = Console(width=WIDTH)
    shown = Table("lengths", "TTFT / TPOT (s)", "prefill first", "chunked", "split", "hybrid", "split ÷ chunked", "aim",
                  "hybrid ÷ pure", title="requests/s per GPU at 90 % joint attainment", box=None)  # fmt: skip
    results: list[dict[str, Any]] = []
    bounds = BOUNDS if arguments.tpot == "all" else (arguments.tpot,)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for case in progress.track(cases, description="goodput"):
            lengths = lengths_of(case.name, arguments.traces)
            if lengths is None:
                console.print(f"{case.name}: left out, its lengths are not in --traces")
                continue
            bench = Bench(lengths, arguments.requests, arguments.seeds)
            for bound in progress.track(bounds, description=case.name):
                results.append(row(case, bound, bench.measure(Slo(case.ttft, getattr(case, bound))), shown))
    console.print(shown)
    return results


def row(case: Case, bound: str, found: Mapping[str, Best], shown: Table) -> dict[str, Any]:
    """One row of the table, which it is added to."""
    tpot, aim = getattr(case, bound), f"≥ {case.aim}" if case.aim and bound == "tight" else ""
    gain, mixed = ratio(found["split"].goodput, found["chunked"].goodput), ratio(found["hybrid"].goodput, pure(found))
    cells = [f"{best.goodput:.2f} ({best.setting})" for best in found.values()]
    shown.add_row(case.name, f"{case.ttft:g} / {tpot:g}", *cells, f"{gain:.2f}", aim, f"{mixed:.2f}")
    systems = {name: asdict(best) for name, best in found.items()}
    return {
        "case": case.name,
        "ttft": case.ttft,
        "tpot": tpot,
        "ratio": gain,
        "aim": aim,
        "hybrid_ratio": mixed,
    } | systems


def winners(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The same at every point of the grid, along its rows to and fro so that each search begins near its end."""
    lengths = lengths_of(case.name, arguments.traces)
    if lengths is None:
        raise SystemExit(f"the lengths of {case.name} are not in --traces")
    bench, found = Bench(lengths, arguments.requests, arguments.seeds), {}
    grid = [(ttft, tpot) for i, ttft in enumerate(MAP_TTFT) for tpot in MAP_TPOT[:: -1 if i % 2 else 1]]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for ttft, tpot in progress.track(grid, description=f"{case.name}: grid"):
            found[ttft, tpot] = bench.measure(Slo(ttft, tpot), baseline=False)
            draw(found, f"{case.name}: requests/s per GPU, and the hybrid beside the better one", arguments.map)
    ratios = [ratio(cell["hybrid"].goodput, pure(cell)) for cell in found.values()]
    Console(width=WIDTH).print(f"hybrid ÷ better one of split and chunked: {min(ratios):.2f} to {max(ratios):.2f}")
    return [
        {"ttft": ttft, "tpot": tpot} | {name: asdict(best) for name, best in cell.items()}
        for (ttft, tpot), cell in found.items()
    ]


def draw(found: Mapping[tuple[float, float], Mapping[str, Best]], title: str, path: Path) -> None:
    """Each cell: the better one of the pure ones by colour, goodput of all three, the hybrid relative to the better."""
    figure = Figure(figsize=(1.5 * len(MAP_TPOT) + 1, 1.15 * len(MAP_TTFT) + 1.3), layout="constrained")
    axes = figure.subplots()
    for (ttft, tpot), cell in found.items():
        x, y = MAP_TPOT.index(tpot), MAP_TTFT.index(ttft)
        values = {name: best.goodput for name, best in cell.items()}
        gain = ratio(values["split"], values["chunked"])
        winner = "split" if gain > LEVEL else "chunked" if gain < 1 / LEVEL else "level"
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=COLOURS[winner], alpha=0.45, edgecolor="white"))
        axes.text(x, y + 0.17, f"{ratio(values['hybrid'], pure(cell)):.2f}×", ha="center", va="center", fontsize=15)
        axes.text(x, y - 0.22, "split {split:.2f}\nchunked {chunked:.2f}\nhybrid {hybrid:.2f}".format(**values),
                  ha="center", va="center", fontsize=7.5)  # fmt: skip
    axes.set(xlim=(-0.5, len(MAP_TPOT) - 0.5), ylim=(-0.5, len(MAP_TTFT) - 0.5), xlabel="TPOT (s)", ylabel="TTFT (s)")
    axes.set_xticks(range(len(MAP_TPOT)), map(str, MAP_TPOT))
    axes.set_yticks(range(len(MAP_TTFT)), map(str, MAP_TTFT))
    names = {"split": "split wins", "chunked": "chunked wins", "level": "level (2 %)"}
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=COLOURS[name], alpha=0.45, label=label) for name, label in names.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)


def scale(sizes: Sequence[str]) -> list[dict[str, Any]]:
    """The rate grows with the instances, so that the load of each stays the same."""
    shown = Table("instances", "requests", "seconds", "requests/s", "events/s", "tokens/s", "peak MiB", box=None)
    results = []
    for size in sizes:
        machines, requests = map(int, size.split("x"))
        results.append(cost(machines, requests))
        shown.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in results[-1].values()))
    Console().print(shown)
    return results


def cost(machines: int, requests: int) -> dict[str, Any]:
    """Of one simulation, in seconds of CPU time; the peak is that of the process so far."""
    fleet = instances("p", Phase.PREFILL, 3 * machines // 8, PREFILL_BUDGET)
    fleet += instances("d", Phase.DECODE, 5 * machines // 8, PREFILL_BUDGET)
    arrivals = endless(catalogue.workload("azure-conv").sample(), 1.9 * machines, requests)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task, began = progress.add_task(f"{machines} instances", total=requests), time.process_time()
        outcome = simulate(
            deployment(fleet), arrivals, DistServe(), candidates=CANDIDATES,
            progress=lambda done: None if done % 1000 else progress.update(task, completed=done),
        )  # fmt: skip
        seconds = time.process_time() - began
    tokens = sum(one.prompt_tokens + one.output_tokens for one in outcome.requests)
    per_second = [value / seconds for value in (requests, outcome.events, tokens)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    names = ("instances", "requests", "seconds", "requests_per_s", "events_per_s", "tokens_per_s", "peak_mib")
    return dict(zip(names, (machines, requests, seconds, *per_second, peak), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder with the lengths of ShareGPT and arXiv")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this one")
    parser.add_argument("--tpot", choices=[*BOUNDS, "all"], default="all", help="which bound of each case")
    parser.add_argument("--requests", type=int, default=1000, help="of each seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--map", type=Path, help="draw who wins where for one case (.png, .svg)")
    parser.add_argument("--scale", nargs="*", metavar="SIZE", help="measure the simulator itself: instances x requests")
    parser.add_argument("--json", type=Path, help="write the results")
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.case or case.name in arguments.case]
    if arguments.scale is not None:
        results = scale(arguments.scale or SIZES)
    elif arguments.map:
        results = winners(cases[0], arguments)
    else:
        results = table(cases, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
