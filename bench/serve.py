"""A whole mesh under rising load, beside `vllm serve` on the same requests.

    python bench/serve.py [--vllm PYTHON] [--lengths FILE] [--rates 0.5 1 1.5 2 3] [--json FILE]

Requests come as a Poisson process; their lengths are drawn from a trace and multiplied by `--scale`, their tokens are
random. Every rate runs for `--seconds` on systems that were idle; what is unfinished then is cut off. kvmesh has one
prefill and one decode worker of one thread each, vLLM two threads. One load on any mesh: `kvmesh bench serve`.

    output    tokens per second that reached the client, over the whole run
    P99 TBT   between messages that bring tokens, over all answers, whether they were finished or not
    TTFT      median from the scheduled arrival to the first token; – if half of the answers never began
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
from peers import vllm_server
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.bench.load import LoadGenerator, Tally
from kvmesh.bench.prompts import vocabulary_range
from kvmesh.bench.statistics import OK, Record, percentile
from kvmesh.bench.targets import MeshTarget, OpenAiTarget, Target
from kvmesh.bench.workload import Arrival, Segment
from kvmesh.cli.launch import free_port
from kvmesh.cli.mesh import engine_settings
from kvmesh.cli.run import temporary_mesh
from kvmesh.client import AsyncClient
from kvmesh.hub import resolve
from kvmesh.loop import run
from kvmesh.planner import catalogue, traces

WARM_UP_RATE, WARM_UP_SECONDS = 1.0, 5.0
SHORTEST_PROMPT, SHORTEST_OUTPUT = 16, 2

Connect = Callable[[], AbstractAsyncContextManager[Target]]


@dataclass(frozen=True, slots=True)
class Row:
    system: str
    rate: float
    requests: int
    finished: int
    failed: int
    output_tokens_per_s: float
    p99_tbt_s: float
    p50_ttft_s: float | None


def arrivals_of(lengths: Sequence[tuple[int, int]], rate: float, seconds: float) -> list[Arrival]:
    """Equal requests at every rate, only closer together."""
    drawn = traces.endless(lengths, rate, requests=math.ceil(10 * rate * seconds) + 10)
    due = enumerate(itertools.takewhile(lambda one: one.at < seconds, drawn))
    return [Arrival(one.at, (Segment(number, one.prompt_tokens),), one.output_tokens) for number, one in due]


def scaled(lengths: Sequence[tuple[int, int]], scale: float) -> list[tuple[int, int]]:
    return [
        (max(SHORTEST_PROMPT, round(prompt * scale)), max(SHORTEST_OUTPUT, round(output * scale)))
        for prompt, output in lengths
    ]


@asynccontextmanager
async def mesh_at(address: str) -> AsyncIterator[Target]:
    async with AsyncClient(address) as client:
        yield MeshTarget(client)


@asynccontextmanager
async def server_at(address: str) -> AsyncIterator[Target]:
    async with httpx2.AsyncClient(base_url=address, timeout=None, limits=httpx2.Limits()) as http:
        yield OpenAiTarget(http, "model")


async def replay(
    connect: Connect, arrivals: Sequence[Arrival], vocabulary: range, seconds: float, seed: float
) -> list[Record]:
    """Prompts are the same for each system and others for every seed: nobody finds one in a cache."""
    async with connect() as target:
        generator = LoadGenerator(target, vocabulary, limit=seconds, seed=seed)
        return await generator.run(arrivals, Tally(len(arrivals)))


def row(system: str, rate: float, records: Sequence[Record], seconds: float) -> Row:
    cut = [record for record in records if record.status == "DEADLINE_EXCEEDED"]
    finished = sum(record.status == OK for record in records)
    first = percentile([math.inf if record.ttft is None else record.ttft for record in records], 0.5)
    return Row(
        system,
        rate,
        len(records),
        finished,
        len(records) - finished - len(cut),
        sum(record.output_tokens for record in records) / seconds,
        percentile([gap for record in records for gap in record.gaps], 0.99),
        first if math.isfinite(first) else None,
    )


def measure(system: str, connect: Connect, vocabulary: range, args: argparse.Namespace, bar: Progress) -> list[Row]:
    lengths = scaled(catalogue.workload(args.lengths).sample(), args.scale)
    warm_up = arrivals_of(lengths, WARM_UP_RATE, WARM_UP_SECONDS)
    run(replay(connect, warm_up, vocabulary, 4 * WARM_UP_SECONDS, 0))
    rows = []
    for rate in bar.track(args.rates, description=system):
        arrivals = arrivals_of(lengths, rate, args.seconds)
        rows.append(row(system, rate, run(replay(connect, arrivals, vocabulary, args.seconds, rate)), args.seconds))
    return rows


def measure_all(args: argparse.Namespace) -> list[Row]:
    """One system after another: each has the machine for itself."""
    folder = resolve(args.model)
    vocabulary = vocabulary_range(folder.vocabulary_size)
    rows = []
    with Progress(console=Console(stderr=True)) as bar:
        settings = engine_settings(args.precision, 1) | {"KVMESH_POLICY": args.policy}
        with temporary_mesh(args.model, 1, 1, 1, settings) as address:
            rows += measure("kvmesh", lambda: mesh_at(address), vocabulary, args, bar)
        if args.vllm:
            with vllm_server(args.vllm, folder.path, free_port(), threads=2) as server:
                rows += measure("vLLM", lambda: server_at(server), vocabulary, args, bar)
    return rows


def show(rows: Sequence[Row]) -> None:
    systems = list(dict.fromkeys(row.system for row in rows))
    table = Table(
        "requests/s", *(f"{one}: {what}" for what in ("tokens/s", "P99 TBT", "TTFT") for one in systems), box=None
    )
    for rate in dict.fromkeys(row.rate for row in rows):
        mine = [row for row in rows if row.rate == rate]
        cells = [f"{row.output_tokens_per_s:,.0f}" for row in mine] + [f"{row.p99_tbt_s * 1e3:,.0f} ms" for row in mine]
        table.add_row(f"{rate:g}", *cells, *(f"{row.p50_ttft_s:.2f} s" if row.p50_ttft_s else "–" for row in mine))
    Console().print(table)
    best = {one: max(row.output_tokens_per_s for row in rows if row.system == one) for one in systems}
    print("at saturation: " + ", ".join(f"{one} {rate:,.0f} tokens/s" for one, rate in best.items()))
    if failed := sum(row.failed for row in rows):
        print(f"{failed} requests failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM for CPUs")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--precision", default="auto", help="of kvmesh's weights (default auto); vLLM has bf16")
    parser.add_argument("--policy", default="placement", help="of kvmesh's router (default placement)")
    parser.add_argument("--lengths", default="azure-conv", help="azure-conv, azure-code or a CSV of lengths")
    parser.add_argument("--scale", type=float, default=0.25, help="of prompts and outputs (default 0.25)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 1.5, 2, 3], help="requests per second")
    parser.add_argument("--seconds", type=float, default=40, help="that each rate runs for (default 40)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    rows = measure_all(args)
    show(rows)
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
