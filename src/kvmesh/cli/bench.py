"""`kvmesh bench serve`: a load generator over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvmesh.bench.load import LoadGenerator, Tally
from kvmesh.bench.prompts import vocabulary_range
from kvmesh.bench.report import latency_table, plot_latencies, rates_lines
from kvmesh.bench.statistics import OK, Record, Slo, evaluate, percentile
from kvmesh.bench.targets import MeshTarget
from kvmesh.bench.workload import Arrival, Lengths, fit, poisson, read_trace
from kvmesh.cli.mesh import (
    DEFAULT_MODEL,
    DecodeOption,
    KvstoreOption,
    MeshModelOption,
    PrefillOption,
)
from kvmesh.cli.render import notes
from kvmesh.cli.run import temporary_mesh
from kvmesh.cli.talk import AddressOption, connect, default_address
from kvmesh.client import AsyncClient, ModelInfo
from kvmesh.errors import InvalidArgument, Unavailable
from kvmesh.loop import run

REFRESH_SECONDS = 0.25
DEFAULT_REQUESTS = 50

app = typer.Typer(no_args_is_help=True, help="Measure a mesh.")


@app.callback()
def bench() -> None:
    """Measure a mesh."""


@app.command()
def serve(
    address: AddressOption = None,
    up: Annotated[bool, typer.Option("--up", help="Start a mesh for the run, and stop it.")] = False,
    prefill: PrefillOption = 1,
    decode: DecodeOption = 1,
    kvstore: KvstoreOption = 1,
    model: MeshModelOption = DEFAULT_MODEL,
    rate: Annotated[float, typer.Option(min=0.001, help="Poisson arrivals per second.")] = 2.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests. Default: 50, or all of the trace.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="128, or 64-256 for uniform lengths.")] = "128",
    output_tokens: Annotated[str, typer.Option(help="As for prompts.")] = "32",
    shared_tokens: Annotated[int, typer.Option(min=0, help="Tokens with which prompts begin alike.")] = 0,
    shared_prefixes: Annotated[int, typer.Option(min=1, help="How many such beginnings there are.")] = 1,
    trace: Annotated[Path | None, typer.Option(help="Azure .csv or Mooncake .jsonl, in place of Poisson.")] = None,
    speedup: Annotated[float, typer.Option(min=0.001, help="Replay the trace so many times as fast.")] = 1.0,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Cut longer prompts.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(min=1, help="Cut longer outputs.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same workload.")] = 0,
    timeout: Annotated[float | None, typer.Option(help="Seconds a request may take.")] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Seconds per output token.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything, each request included.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the distributions (.png, .svg, .pdf).")] = None,
) -> None:
    """Send a workload, open loop, and report latencies, throughput and goodput."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items() if v is not None}
    if trace:
        arrivals = read_trace(trace, speedup=speedup, limit=requests, seed=seed)
    else:
        arrivals = poisson(
            rate,
            requests or DEFAULT_REQUESTS,
            Lengths.parse(prompt_tokens),
            Lengths.parse(output_tokens),
            seed=seed,
            shared_tokens=shared_tokens,
            shared_prefixes=shared_prefixes,
        )
    if not arrivals:
        raise InvalidArgument(f"{trace} has no requests")
    mesh = temporary_mesh(model, prefill, decode, kvstore) if up else contextlib.nullcontext(address)
    with mesh as target:
        served = _served_model(target)
        fitted = [fit(arrival, served.max_model_len, max_prompt_tokens, max_output_tokens) for arrival in arrivals]
        records = run(_measure(target or default_address(), fitted, served, seed, timeout))
    slo = Slo(slo_ttft, slo_tpot)
    cut = sum(before != after for before, after in zip(arrivals, fitted, strict=True))
    _show(records, slo, cut)
    if json:
        json.write_text(_document(records, slo, settings, cut))
    if plot:
        plot_latencies(records, slo, plot)


def _served_model(address: str | None) -> ModelInfo:
    with connect(address) as client:
        models = client.models()
    if not models:
        raise Unavailable("the mesh serves no model")
    return models[0]


async def _measure(
    address: str, arrivals: list[Arrival], model: ModelInfo, seed: int, timeout: float | None
) -> list[Record]:
    tally = Tally(len(arrivals))
    async with AsyncClient(address) as client:
        vocabulary = vocabulary_range(model.vocabulary_size)
        generator = LoadGenerator(MeshTarget(client), vocabulary, timeout=timeout, seed=seed)
        async with asyncio.TaskGroup() as tasks:
            with _progress(tally) as refresh:
                display = tasks.create_task(_refresh_forever(refresh))
                records = await generator.run(arrivals, tally)
                display.cancel()
    return records


async def _refresh_forever(refresh: Any) -> None:
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        refresh()


@contextlib.contextmanager
def _progress(tally: Tally) -> Iterator[Any]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=notes(), transient=True) as progress:
        task = progress.add_task("", total=tally.total)
        yield lambda: progress.update(task, completed=len(tally.records), description=_live(tally))


def _live(tally: Tally) -> str:
    first = percentile([r.ttft for r in tally.records if r.ttft is not None], 0.5)
    failed = sum(record.status != OK for record in tally.records)
    median = "" if math.isnan(first) else f" · TTFT p50 {first * 1e3:.0f} ms"
    return f"{tally.running} running · {failed} failed · {tally.tokens} tokens{median}"


def _show(records: list[Record], slo: Slo, cut: int) -> None:
    report = evaluate(records, slo)
    console = Console(highlight=False)
    console.print(latency_table(report))
    for line in rates_lines(report, slo):
        console.print(line, soft_wrap=True)
    if cut:
        console.print(f"{cut} requests were cut to the limits of the context", soft_wrap=True)


def _document(records: list[Record], slo: Slo, settings: dict[str, Any], cut: int) -> str:
    figures = asdict(evaluate(records, slo))
    rows = [asdict(record) for record in records]
    return json.dumps({"settings": settings, "slo": asdict(slo), "cut": cut, "figures": figures, "requests": rows})
