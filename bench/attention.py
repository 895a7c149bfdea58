"""What attention costs: milliseconds per layer of each back end, and decode steps of a whole model before and after.

    python bench/attention.py [--threads 1] [--quick] [--cpu-time] [--no-model] [--json FILE]

Heads as in SmolLM2-135M (9 query heads, 3 KV heads of 64), blocks in random order. Back ends take turns within one
process and the best of many repeats counts, so that ratios stand even where a neighbour takes part of the machine;
--cpu-time counts the CPU time of this thread instead of wall time (one thread only), which a busy neighbour hardly
moves.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kvmesh import hub
from kvmesh.engine.api import KvArray, KvLayout
from kvmesh.engine.attention.choice import checked_kernel, native_back_end, torch_back_end
from kvmesh.engine.attention.interface import Attention, BackEnd, Segment
from kvmesh.engine.attention.pool import KvPool, PagedKv, to_wire
from kvmesh.engine.attention.reference import ReferenceAttention
from kvmesh.engine.batch import Batch, Draw, Row
from kvmesh.engine.build import kv_layout_of
from kvmesh.engine.loading import load
from kvmesh.engine.runner import TorchRunner
from kvmesh.types import BLOCK_TOKENS, SamplingParams

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 9, 3, 64, 4
DTYPES = ("float32", "bfloat16")
SLOW = "reference"


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` sequences of `context` tokens, of which the last `tokens` are new."""

    batch: int
    context: int
    tokens: int

    @property
    def name(self) -> str:
        kind = "decode" if self.tokens == 1 else "prefill"
        return f"{kind} B{self.batch} S{self.context}" + (f" T{self.tokens}" if self.tokens > 1 else "")


CASES = [Case(batch, context, 1) for context in (512, 2048) for batch in (1, 8, 32)]
CASES += [Case(1, 512, 512), Case(1, 2048, 512), Case(1, 2048, 2048)]


@dataclass(frozen=True, slots=True)
class Result:
    case: str
    dtype: str
    threads: int
    milliseconds: Mapping[str, float]
    """Per layer, or per step of the whole model, by back end."""


def textbook(layout: KvLayout, blocks: int, windows: Sequence[int | None]) -> tuple[PagedKv, Attention]:
    pool = KvPool(layout, blocks)
    return pool, ReferenceAttention(pool, windows)


def back_ends(layout: KvLayout, threads: int) -> dict[str, BackEnd]:
    return {"native": native_back_end(checked_kernel(layout), threads), "torch": torch_back_end(), SLOW: textbook}


def best_of(runs: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Least seconds of each, taken in turns; the textbook runs twice."""
    best: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if name == SLOW and repeat > 2:
                continue
            began = clock()
            run()
            seconds = clock() - began
            best[name] = min(best.get(name, seconds), seconds)
    return best


def tables(case: Case) -> list[list[int]]:
    """Block tables in random order."""
    size = -(-case.context // BLOCK_TOKENS)
    blocks = random.Random(0).sample(range(size * case.batch), size * case.batch)
    return [blocks[i * size : (i + 1) * size] for i in range(case.batch)]


def history(layout: KvLayout, case: Case) -> KvArray:
    """KV for every position: memory that was never touched would read too fast."""
    return to_wire(torch.randn(layout.chunk_shape(case.context)).to(getattr(torch, layout.dtype)))


def measure_layer(case: Case, dtype: str, threads: int, repeats: int, clock: Callable[[], float]) -> Result:
    layout, runs = KvLayout(LAYERS, KV_HEADS, HEAD_DIM, dtype), {}
    segments = [Segment(case.context - case.tokens, case.tokens, table) for table in tables(case)]
    fused = torch.randn(case.batch * case.tokens, HEADS + 2 * KV_HEADS, HEAD_DIM).to(getattr(torch, dtype))
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    data = history(layout, case)
    for name, back_end in back_ends(layout, threads).items():
        pool, attention = back_end(layout, sum(map(len, tables(case))), [None] * LAYERS)
        for table in tables(case):
            pool.write(table, 0, data)
        attention.plan(segments)
        runs[name] = lambda attention=attention: [attention.run(layer, q, k, v) for layer in range(LAYERS)]
    best = best_of(runs, repeats, clock)
    return Result(case.name, dtype, threads, {name: 1e3 * seconds / LAYERS for name, seconds in best.items()})


def measure_model(
    dtype: str, threads: int, cases: Sequence[Case], repeats: int, clock: Callable[[], float]
) -> list[Result]:
    """Whole decode steps, sampling included."""
    folder = hub.resolve(hub.DEFAULT_MODEL)
    model, layout = load(folder, dtype, "cpu"), kv_layout_of(folder, dtype)
    draw = (Draw(SamplingParams(max_tokens=1, temperature=0.0), 0, 0, (), ()),)
    results = []
    for case in cases:
        batch, runs = Batch(tuple(Row([5], case.context - 1, table, draw) for table in tables(case))), {}
        data = history(layout, case)
        for name, back_end in list(back_ends(layout, threads).items())[:2]:
            runner = TorchRunner(model, sum(map(len, tables(case))), None, back_end)
            for row in batch.rows:
                runner.write_kv(row.block_ids, 0, data)
            runs[name] = partial(runner.run, batch)
        best = best_of(runs, repeats, clock)
        milliseconds = {name: 1e3 * seconds for name, seconds in best.items()}
        results.append(Result(f"step {case.name}", dtype, threads, milliseconds))
    return results


def show(results: Sequence[Result]) -> None:
    table = Table(title="attention, ms per layer; of the whole model, ms per step")
    for column in ("case", "dtype", "threads", "native", "torch", "reference", "torch / native"):
        table.add_column(column)
    for result in results:
        ms = result.milliseconds
        cells = [f"{ms[name]:.3f}" if name in ms else "" for name in ("native", "torch", SLOW)]
        table.add_row(result.case, result.dtype, str(result.threads), *cells, f"{ms['torch'] / ms['native']:.2f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few repeats and short contexts only")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this thread instead of wall time")
    parser.add_argument("--no-model", action="store_true", help="attention alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads > 1:
        parser.error("--cpu-time counts one thread")
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    cases = [case for case in CASES if case.context <= 512 or not arguments.quick]
    results = []
    with torch.inference_mode():
        for dtype in DTYPES:
            for case in cases:
                repeats = (30 if case.tokens == 1 else 6) // (3 if arguments.quick else 1)
                results.append(measure_layer(case, dtype, arguments.threads, repeats, clock))
            if not arguments.no_model:
                steps = [case for case in cases if case.tokens == 1 and case.batch * case.context <= 32 * 512]
                results += measure_model(dtype, arguments.threads, steps, 5, clock)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
