"""Time between tokens while long prompts arrive: whole prompts, fixed token budgets, and the budget of a TBT target.

    python bench/chunked.py [--decodes 8] [--prompt 1536] [--prompts 4] [--tbt 0.15] [--precision bf16] [--threads 1]
                            [--repeats 3] [--json FILE]

One engine with the default model. `--decodes` sequences generate; then prompts arrive, one after the other, each when
the one before has its first token. TBT: the time between two tokens of a decoding sequence while there is a prompt.
Budgets take turns in one process; medians over the repeats. Sarathi-Serve (arXiv 2403.02310) reports up to 28.3 times
the undisturbed TBT where prompts are not chunked, and at most 25 % more prefill time at chunks of 512.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvmesh import hub
from kvmesh.bench.statistics import percentile
from kvmesh.engine.api import EngineRequest, TokenOutput
from kvmesh.engine.budget import profiled_budget
from kvmesh.engine.build import build_engine
from kvmesh.engine.core import EngineCore
from kvmesh.types import SamplingParams

CONTEXT, WHOLE = 256, 1 << 20


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds; `undisturbed`: the median TBT while there is no prompt. `prefill`: prompt tokens per second."""

    name: str
    budget: int
    undisturbed: float
    tbt_p50: float
    tbt_p99: float
    tbt_max: float
    prefill: float


def run(engine: EngineCore, name: str, budget: int, decodes: int, prompt: int, prompts: int, seed: int) -> Result:
    rng = random.Random(f"{name} {seed}")  # No prompt twice: its KV would be in the pool already.
    engine.scheduler.token_budget = budget
    for number in range(decodes):
        add(engine, f"decode {number}", rng, CONTEXT, 100_000)
    waiting = {f"decode {number}" for number in range(decodes)}
    while waiting:
        waiting -= {event.request_id for event in engine.step() if isinstance(event, TokenOutput)}
    calm = gaps(engine, 12, "")
    began, busy = time.perf_counter(), []
    for number in range(prompts):
        add(engine, f"prompt {number}", rng, prompt, 1)
        busy += gaps(engine, WHOLE, f"prompt {number}")
    seconds = time.perf_counter() - began
    for number in range(decodes):
        engine.abort(f"decode {number}")
    p50, p99 = percentile(busy, 0.5), percentile(busy, 0.99)
    return Result(name, budget, median(calm), p50, p99, max(busy), prompts * prompt / seconds)


def add(engine: EngineCore, name: str, rng: random.Random, tokens: int, longest: int) -> None:
    prompt = tuple(rng.choices(range(1000, 40_000), k=tokens))
    longest = min(longest, engine.scheduler.max_model_len - tokens)
    engine.add(EngineRequest(name, prompt, SamplingParams(max_tokens=longest, temperature=0.0)))


def gaps(engine: EngineCore, steps: int, until: str) -> list[float]:
    """Seconds between tokens of each decoding sequence, for so many steps or until a prompt has its first token."""
    found: list[float] = []
    before = time.perf_counter()
    for _ in range(steps):
        outputs = [event for event in engine.step() if isinstance(event, TokenOutput)]
        now = time.perf_counter()
        if any(output.request_id.startswith("decode") for output in outputs):
            found += [now - before] * sum(output.request_id.startswith("decode") for output in outputs)
            before = now
        if any(output.request_id == until for output in outputs):
            break
    return found


def middle(results: Sequence[Result]) -> Result:
    """The median of every figure."""
    rows = [list(asdict(result).values())[2:] for result in results]
    return Result(results[0].name, results[0].budget, *(median(column) for column in zip(*rows, strict=True)))


def show(results: Sequence[Result]) -> None:
    table = Table(title="time between tokens while prompts arrive, ms")
    for column in ("prompts", "budget", "undisturbed", "p50", "p99", "max", "p99 / undisturbed", "prefill tokens/s"):
        table.add_column(column, justify="right")
    for r in results:
        times = (f"{1e3 * value:.0f}" for value in (r.undisturbed, r.tbt_p50, r.tbt_p99, r.tbt_max))
        budget = "none" if r.budget == WHOLE else str(r.budget)
        table.add_row(r.name, budget, *times, f"{r.tbt_p99 / r.undisturbed:.1f}", f"{r.prefill:.0f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decodes", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1536)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tbt", type=float, default=0.15, help="target in seconds")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine = build_engine(hub.pull(), precision=arguments.precision, threads=arguments.threads)
    target = profiled_budget(engine.runner, arguments.tbt)
    ways = {"whole": WHOLE, "chunks": 512, "small chunks": 128, f"TBT {arguments.tbt:g} s": target}
    shape = (arguments.decodes, arguments.prompt, arguments.prompts)
    turns = [(name, budget, seed) for seed in range(arguments.repeats) for name, budget in ways.items()]
    runs = [
        run(engine, name, budget, *shape, seed)
        for name, budget, seed in track(turns, description="measuring", console=Console(stderr=True))
    ]
    results = [middle([result for result in runs if result.name == name]) for name in ways]
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
