"""Tokens per second of the engine at each precision, beside eager torch and, if named, vLLM and llama.cpp.

    python bench/engine.py [--precision bf16 auto ...] [--batch 1 8 16 32] [--threads 2] [--json FILE]

All of a batch's prompts are prefilled in iterations of `--prompt` tokens; then `--new` iterations of one token each
are timed with every sequence decoding. Systems take turns, `--repeats` times, and the best of each counts: on shared
cores the least disturbed run says most. The baseline is the same decoder in eager torch: bfloat16, one padded batch,
SDPA with `enable_gqa`. Threads sleep while they wait, as `kvmesh up` has it; `OMP_WAIT_POLICY` in the environment
goes before that. Peers run in processes of their own, after the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Read once, when torch loads its threads.

import torch
import torch.nn.functional as F
from peers import llama_bench, vllm
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from kvmesh.engine.api import EngineRequest, TokenOutput
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.build import build_engine
from kvmesh.engine.core import EngineCore
from kvmesh.engine.linear import PRECISIONS
from kvmesh.engine.loading import load
from kvmesh.engine.models.config import DecoderConfig
from kvmesh.hub import ModelFolder, resolve
from kvmesh.types import BLOCK_TOKENS, SamplingParams

Prompts = list[list[int]]
System = Callable[[Prompts, int], tuple[float, float]]
"""(prompts of one length, new tokens) -> seconds to prefill them all, and seconds per decode iteration."""


@dataclass(frozen=True, slots=True)
class Row:
    system: str
    precision: str
    prompt: int
    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class Kvmesh:
    """The whole engine: scheduler, block pool, attention, sampling."""

    def __init__(self, engine: EngineCore) -> None:
        self._engine = engine

    def __call__(self, prompts: Prompts, new: int) -> tuple[float, float]:
        engine = self._engine
        # The first sequence decodes along while the others prefill: room for those tokens too.
        sampling = SamplingParams(max_tokens=new + len(prompts) + 1, temperature=0.0, ignore_eos=True)
        names = [f"{time.monotonic_ns()}-{i}" for i in range(len(prompts))]
        began = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            engine.add(EngineRequest(name, tuple(prompt), sampling))
            engine.start(name, 0)
        started: set[str] = set()
        while len(started) < len(prompts):
            started |= {event.request_id for event in engine.step() if isinstance(event, TokenOutput)}
        prefilled = time.perf_counter()
        steps = [self._timed_step(len(prompts)) for _ in range(new)]
        for name in names:
            engine.abort(name)
        return prefilled - began, statistics.median(steps)

    def _timed_step(self, expected: int) -> float:
        began = time.perf_counter()
        events = self._engine.step()
        seconds = time.perf_counter() - began
        if sum(isinstance(event, TokenOutput) for event in events) != expected:
            raise SystemExit("an iteration did not decode the whole batch: the figures would mean nothing")
        return seconds


class PaddedAttention:
    """What eager code does: a cache `[batch, kv_heads, length, d]` per layer, and the kernel's own `enable_gqa`."""

    def __init__(self, config: DecoderConfig, batch: int, length: int) -> None:
        shape = (config.layers, 2, batch, config.kv_heads, length, config.head_dim)
        self._cache = torch.zeros(shape, dtype=torch.bfloat16)
        self._batch, self._start, self._end = batch, 0, 0

    def plan(self, segments: Sequence[Segment]) -> None:
        self._start, self._end = segments[0].start, segments[0].end

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, *fresh = (x.unflatten(0, (self._batch, -1)).transpose(1, 2) for x in (q, k, v))
        for plane, values in enumerate(fresh):
            self._cache[layer, plane, :, :, self._start : self._end] = values
        keys, values = self._cache[layer, :, :, :, : self._end]
        causal = self._start == 0
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


class Eager:
    """The decoder on dense bfloat16 weights, greedy."""

    def __init__(self, folder: ModelFolder) -> None:
        self._decoder = load(folder, "bfloat16", "cpu")

    @torch.inference_mode()
    def __call__(self, prompts: Prompts, new: int) -> tuple[float, float]:
        batch, length = len(prompts), len(prompts[0])
        self._attention = PaddedAttention(self._decoder.config, batch, length + new)
        began = time.perf_counter()
        tokens = self._step(torch.tensor(prompts), 0)
        prefilled = time.perf_counter()
        steps = []
        for position in range(length, length + new):
            before = time.perf_counter()
            tokens = self._step(tokens, position)
            steps.append(time.perf_counter() - before)
        return prefilled - began, statistics.median(steps)

    def _step(self, tokens: Tensor, start: int) -> Tensor:
        batch, count = tokens.shape
        self._attention.plan([Segment(start, count, ())] * batch)
        positions = torch.arange(start, start + count).repeat(batch)
        hidden = self._decoder.forward(self._decoder.embed(tokens.flatten()), positions, self._attention)
        return self._decoder.logits(hidden[count - 1 :: count]).argmax(dim=-1, keepdim=True)


def systems_of(folder: ModelFolder, args: argparse.Namespace) -> dict[tuple[str, str], System]:
    """By (system, precision), all loaded."""
    per_sequence = -(-(args.prompt + args.new + max(args.batch) + 1) // BLOCK_TOKENS)
    systems: dict[tuple[str, str], System] = {}
    for precision in args.precision:
        engine = build_engine(
            folder,
            precision=precision,
            blocks=per_sequence * max(args.batch),
            token_budget=args.prompt + max(args.batch),
            threads=args.threads,
            device="cpu",
        )
        systems["kvmesh", precision] = Kvmesh(engine)
    if not args.no_baseline:
        systems["eager torch", "bf16"] = Eager(folder)
    return systems


def measure(folder: ModelFolder, args: argparse.Namespace) -> list[Row]:
    systems = systems_of(folder, args)
    rng = random.Random(0)
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("engine", total=len(args.batch) * args.repeats * len(systems))
        for batch in args.batch:
            best = dict.fromkeys(systems, (float("inf"), float("inf")))
            for _ in range(args.repeats):
                prompts = [rng.choices(range(100, folder.vocabulary_size), k=args.prompt) for _ in range(batch)]
                for name, system in systems.items():
                    progress.update(task, description=f"{' '.join(name)}, batch {batch}")
                    prefill, step = system(prompts, args.new)
                    best[name] = (min(best[name][0], prefill), min(best[name][1], step))
                    progress.advance(task)
            rows += [
                Row(*name, args.prompt, batch, batch * args.prompt / prefill, batch / step)
                for name, (prefill, step) in best.items()
            ]
    return rows


def peers(folder: ModelFolder, args: argparse.Namespace) -> list[Row]:
    """Rows of the engines named on the command line."""
    rows = []
    if args.vllm:
        figures = vllm(args.vllm, folder.path, args.prompt, args.new, args.batch, args.threads)
        rows += [Row("vLLM", "bf16", args.prompt, *figure) for figure in figures]
    if args.llama_bench:
        figures = llama_bench(args.llama_bench, args.gguf, args.prompt, args.new, args.batch, args.threads)
        rows += [Row("llama.cpp", args.gguf.stem, args.prompt, *figure) for figure in figures]
    return rows


def show(rows: Sequence[Row], threads: int) -> None:
    table = Table(title=f"Tokens per second, prompt {rows[0].prompt}, {threads} threads")
    batches = list(dict.fromkeys(row.batch for row in rows))
    columns = ["system", "precision", "prefill", *(f"decode B={batch}" for batch in batches)]
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for name in dict.fromkeys((row.system, row.precision) for row in rows):
        mine = {row.batch: row for row in rows if (row.system, row.precision) == name}
        decode = [f"{mine[batch].decode_tokens_per_s:,.0f}" if batch in mine else "–" for batch in batches]
        table.add_row(*name, f"{max(row.prefill_tokens_per_s for row in mine.values()):,.0f}", *decode)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, a folder or a GGUF file")
    parser.add_argument("--precision", nargs="*", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16, 32], help="default: 1 8 16 32")
    parser.add_argument("--prompt", type=int, default=512, help="tokens per prompt (default 512)")
    parser.add_argument("--new", type=int, default=64, help="timed decode iterations (default 64)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the best counts (default 3)")
    parser.add_argument("--no-baseline", action="store_true", help="leave eager torch out")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM for CPUs")
    parser.add_argument("--llama-bench", metavar="BINARY", help="llama.cpp's llama-batched-bench")
    parser.add_argument("--gguf", type=Path, help="the model for --llama-bench")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if args.llama_bench and not args.gguf:
        parser.error("--llama-bench needs --gguf")
    folder = resolve(args.model)
    torch.set_num_threads(args.threads)
    rows = measure(folder, args) + peers(folder, args)
    show(rows, args.threads)
    if args.json:
        document = {"threads": args.threads, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
