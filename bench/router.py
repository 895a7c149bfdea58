"""What the router costs: tokens/s and CPU per token through one router process, and the TTFT it adds.

    python bench/router.py [--streams 64] [--tokens 512] [--json FILE]

The workers run the fake model, so that the path of a token is all that is measured. Each figure stands beside its
baseline of the same run: the same requests sent to the decode worker directly. CPU time is read from the operating
system for the router's process alone; on a machine whose cores are shared with the workers and this client, tokens/s
per core (one second over the CPU time of a token) is the figure to compare, and the tokens/s seen is a lower bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.cli.launch import Launcher
from kvmesh.cli.plan import MeshPlan
from kvmesh.loop import run
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.stream import stream, unary
from kvmesh.types import Role
from kvmesh.v1 import common_pb2, decode_pb2, decode_pb2_grpc, router_pb2, router_pb2_grpc

PROMPT_TOKENS = 64
Run = Callable[[int, int], Awaitable[float]]
"""(request number, tokens) -> seconds to the first token."""


@dataclass(frozen=True, slots=True)
class Throughput:
    path: str
    streams: int
    tokens: int
    tokens_per_s: float
    cpu_us_per_token: float
    tokens_per_s_per_core: float
    messages_per_token: float


class Paths:
    """The two ways to the same tokens: through the router, and straight to the decode worker."""

    def __init__(self, channels: ChannelPool, router: str, worker: common_pb2.WorkerInfo) -> None:
        self._router = router_pb2_grpc.InferenceServiceStub(channels.get(router))
        self._decode = decode_pb2_grpc.DecodeServiceStub(channels.get(worker.address))
        self._worker = worker
        self.messages = 0

    def _stopping(self, tokens: int) -> common_pb2.StoppingParameters:
        return common_pb2.StoppingParameters(max_tokens=tokens, ignore_eos=True)

    def _prompt(self, number: int) -> list[int]:
        return [32 + (number >> shift) % 64 for shift in range(PROMPT_TOKENS)]

    async def through_router(self, number: int, tokens: int) -> float:
        request = router_pb2.GenerateStreamRequest(
            token_ids=router_pb2.TokenIds(ids=self._prompt(number)),
            sampling=common_pb2.SamplingParameters(temperature=0),
            stopping=self._stopping(tokens),
        )
        began, first, seen = time.perf_counter(), 0.0, 0
        async with stream(self._router.GenerateStream(request, timeout=300)) as call:
            async for message in call:
                if message.WhichOneof("event") == "delta":
                    first = first or time.perf_counter() - began
                    seen += len(message.delta.token_ids)
                    self.messages += 1
        return _checked(first, seen, tokens)

    async def direct(self, number: int, tokens: int) -> float:
        request = decode_pb2.DecodeRequest(
            request_id=f"direct-{number}-{time.monotonic_ns()}",
            model=self._worker.model,
            fingerprint=self._worker.fingerprint,
            prompt_token_ids=self._prompt(number),
            samples=[decode_pb2.DecodeSample(index=0)],
            sampling=common_pb2.SamplingParameters(temperature=0, n=1),
            stopping=self._stopping(tokens),
        )
        began, first, seen = time.perf_counter(), 0.0, 0
        async with stream(self._decode.Decode(request, timeout=300)) as call:
            async for message in call:
                for batch in message.samples:
                    first = first or time.perf_counter() - began
                    seen += len(batch.token_ids)
                    self.messages += 1
        return _checked(first, seen, tokens)


def _checked(first: float, seen: int, wanted: int) -> float:
    if seen != wanted:
        raise SystemExit(f"{seen} tokens came back, {wanted} were asked for: the figures would mean nothing")
    return first


@asynccontextmanager
async def mesh(step_seconds: float) -> AsyncIterator[tuple[str, common_pb2.WorkerInfo, psutil.Process]]:
    """A router and one decode worker with the fake model; yields the router's address, the worker, the process."""
    settings = {"KVMESH_FAKE_STEP_SECONDS": str(step_seconds), "KVMESH_MAX_CONCURRENT": "1024"}
    plan = MeshPlan("fake", prefill=0, decode=1, kvstore=0, port=0, settings=settings)
    with tempfile.TemporaryDirectory() as logs:
        launcher = Launcher(plan, Path(logs), die_with_parent=True)
        state = await asyncio.to_thread(launcher.start, lambda ready, total: None, 60.0)
        channels = ChannelPool()
        try:
            service = router_pb2_grpc.MeshServiceStub(channels.get(state.address))
            status = await unary(service.GetMeshStatus(router_pb2.GetMeshStatusRequest(), timeout=10))
            decode = next(w.info for w in status.workers if w.info.role == common_pb2.WORKER_ROLE_DECODE)
            pid = next(record.pid for record in state.processes if record.name.startswith(Role.ROUTER))
            yield state.address, decode, psutil.Process(pid)
        finally:
            await channels.close()
            await asyncio.to_thread(launcher.stop, 1.0)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def throughput(
    paths: Paths, name: str, run: Run, process: psutil.Process, args: argparse.Namespace
) -> Throughput:
    """All streams at once; the CPU is that of `process`."""
    paths.messages = 0
    cpu, began = _cpu_seconds(process), time.perf_counter()
    await asyncio.gather(*(run(number, args.tokens) for number in range(args.streams)))
    seconds, cpu = time.perf_counter() - began, _cpu_seconds(process) - cpu
    total = args.streams * args.tokens
    per_core = total / cpu if cpu else float("nan")
    return Throughput(name, args.streams, total, total / seconds, cpu / total * 1e6, per_core, paths.messages / total)


async def added_ttft(paths: Paths, pairs: int) -> tuple[float, float]:
    """Median TTFT in ms, through the router and direct, by alternating single requests on an idle mesh."""
    routed, direct = [], []
    for number in range(pairs):
        routed.append(await paths.through_router(number, 1) * 1e3)
        direct.append(await paths.direct(number, 1) * 1e3)
    return statistics.median(routed), statistics.median(direct)


async def measure(args: argparse.Namespace) -> dict[str, object]:
    rows: list[Throughput] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("router", total=2 * args.repeats + 1)
        async with mesh(args.step_seconds) as (address, worker, process):
            channels = ChannelPool()
            paths = Paths(channels, address, worker)
            await asyncio.gather(*(paths.through_router(number, 16) for number in range(args.streams)))
            for _ in range(args.repeats):
                for name, run in (("router", paths.through_router), ("direct", paths.direct)):
                    rows.append(await throughput(paths, name, run, process, args))
                    progress.advance(task)
            routed, direct = await added_ttft(paths, args.pairs)
            progress.advance(task)
            await channels.close()
    return {
        "throughput": [asdict(_median([row for row in rows if row.path == name])) for name in ("router", "direct")],
        "ttft_ms": {"router_p50": routed, "direct_p50": direct, "added_p50": routed - direct},
    }


def _median(rows: list[Throughput]) -> Throughput:
    return sorted(rows, key=lambda row: row.cpu_us_per_token or row.tokens_per_s)[len(rows) // 2]


def show(result: dict[str, object]) -> None:
    table = Table(title="Through one router process (fake model)")
    columns = ("path", "streams", "tokens/s seen", "router CPU µs/token", "tokens/s per core", "tokens/message")
    for column in columns:
        table.add_column(column, justify="left" if column == "path" else "right")
    for row in result["throughput"]:  # type: ignore[attr-defined]
        routed = row["path"] == "router"
        table.add_row(
            row["path"],
            str(row["streams"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['cpu_us_per_token']:.1f}" if routed else "–",
            f"{row['tokens_per_s_per_core']:,.0f}" if routed else "–",
            f"{1 / row['messages_per_token']:.1f}",
        )
    console = Console()
    console.print(table)
    ttft: dict[str, float] = result["ttft_ms"]  # type: ignore[assignment]
    console.print(
        f"TTFT p50: {ttft['router_p50']:.2f} ms through the router, {ttft['direct_p50']:.2f} ms direct, "
        f"{ttft['added_p50']:.2f} ms added"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64, help="concurrent requests (default 64)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per request (default 512)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median counts (default 3)")
    parser.add_argument("--pairs", type=int, default=200, help="request pairs for TTFT (default 200)")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="time of a fake decode step (default 0)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    result = run(measure(args))
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
