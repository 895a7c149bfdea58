"""What reading a shared prefix once is worth: decode attention with and without it, by prefix length and batch.

    python bench/hydragen.py [--prefix 1024 2048 4096 8192] [--batch 8 16 32 64] [--own 64] [--dtype bfloat16]
                             [--repeats 5] [--threads 1] [--json FILE]

Every sequence has the prefix and `--own` tokens of its own; blocks lie in random order. Heads of 64 as in
SmolLM2-135M: GQA with 9 query and 3 KV heads, and MHA with 9 and 9. Both ways take turns in one process. With one
thread the CPU time of that thread counts, which a busy neighbour hardly moves; the ratio of medians is the result.
Rows without a prefix share nothing, with 1,024 tokens more of each one's own: there the search for prefixes must
cost nothing. The paper (arXiv 2402.05099) has GPUs and MHA, where the batch that shares is hundreds of sequences;
on a CPU the gain is that one load of a key serves eight rows instead of one group's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.choice import checked_kernel
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.native import SHARING, Kernel, NativeAttention, PackedPool
from kvmesh.types import BLOCK_TOKENS

SHAPES = {"GQA 9/3": (9, 3), "MHA 9/9": (9, 9)}
HEAD_DIM, ALONE = 64, 1024


@dataclass(frozen=True, slots=True)
class Row:
    """Attention of one layer, milliseconds; `ratio`: tokens/s with shared reading over those without."""

    shape: str
    prefix: int
    batch: int
    plain_ms: float
    shared_ms: float
    ratio: float


def segments_of(prefix: int, batch: int, blocks: int, own: int) -> list[Segment]:
    """One decode row a sequence, behind the prefix and `own` tokens that nobody shares."""
    free = random.Random(0).sample(range(blocks), blocks)
    trunk = [free.pop() for _ in range(prefix // BLOCK_TOKENS)]
    tables = [trunk + [free.pop() for _ in range(own // BLOCK_TOKENS)] for _ in range(batch)]
    return [Segment(prefix + own - 1, 1, table) for table in tables]


def measure(
    kernel: Kernel, shape: str, prefix: int, batch: int, own: int, dtype: str, repeats: int, threads: int
) -> Row:
    heads, kv_heads = SHAPES[shape]
    own = own if prefix else own + ALONE
    blocks = (prefix + batch * own) // BLOCK_TOKENS
    pool = PackedPool(KvLayout(1, kv_heads, HEAD_DIM, dtype), blocks, kernel)
    for data in (pool.keys, pool.values):
        data.copy_(torch.randn(data.shape) * 0.5)
    segments = segments_of(prefix, batch, blocks, own)
    q, k, v = (torch.randn(batch, n, HEAD_DIM).to(pool.dtype) for n in (heads, kv_heads, kv_heads))
    ways = [NativeAttention(pool, [None], threads, sharing) for sharing in (None, SHARING)]
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for way, taken in zip(ways, seconds, strict=True):
            taken.append(timed(way, segments, q, k, v, clock))
    plain, shared = (1e3 * statistics.median(taken[1:]) for taken in seconds)
    return Row(shape, prefix, batch, plain, shared, plain / shared)


def timed(
    attention: NativeAttention,
    segments: list[Segment],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    clock: Callable[[], float],
) -> float:
    """Seconds per layer of a step of 30 layers: what it takes to plan is part of it."""
    began = clock()
    attention.plan(segments)
    for _ in range(30):
        attention.run(0, q, k, v)
    return (clock() - began) / 30


def show(rows: list[Row], dtype: str) -> None:
    table = Table(title=f"decode attention per layer, {dtype}: a shared prefix read once against once a sequence")
    for column in ("heads", "prefix", "batch", "plain ms", "shared ms", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        prefix = f"{row.prefix:,}" if row.prefix else "none"
        cells = (f"{row.plain_ms:.3f}", f"{row.shared_ms:.3f}", f"{row.ratio:.2f}")
        table.add_row(row.shape, prefix, str(row.batch), *cells)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--own", type=int, default=64, help="tokens of each sequence that nobody shares (default 64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kernel = checked_kernel(KvLayout(1, 3, HEAD_DIM, arguments.dtype))
    cases = [(s, p, b) for s in SHAPES for p in [*arguments.prefix, 0] for b in arguments.batch]
    with torch.inference_mode():
        rows = [
            measure(kernel, *case, arguments.own, arguments.dtype, arguments.repeats, arguments.threads)
            for case in track(cases, description="measuring", console=Console(stderr=True))
        ]
    show(rows, arguments.dtype)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
