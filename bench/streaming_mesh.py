"""A store behind a slow link, decode workers and a prefill worker in front of it, as processes, for `streaming.py`.

Redis listens on a socket in the file system, which every network namespace shares.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slow_link import SlowLink

from kvmesh import redis_server
from kvmesh.cli.mesh import PROCESS
from kvmesh.cli.processes import last_lines, spawn
from kvmesh.kv.client import StoreClient
from kvmesh.kv.ticket import write_ticket
from kvmesh.registry import Registry
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.convert import sampling_to_proto, ticket_to_proto
from kvmesh.rpc.stream import stream
from kvmesh.types import BLOCK_TOKENS, ChunkSource, KvTicket, Role, SamplingParams, WorkerInfo
from kvmesh.v1 import common_pb2, decode_pb2, prefill_pb2
from kvmesh.v1.decode_pb2_grpc import DecodeServiceStub
from kvmesh.v1.prefill_pb2_grpc import PrefillServiceStub
from kvmesh_router.readers import ReaderLinks

STORED, ASKED = 4096, 16
"""Tokens whose KV is stored, and those that follow."""
DTYPE = "bfloat16"
START_SECONDS = 120.0
PREFILL = "prefill"


@dataclass(frozen=True)
class Scheme:
    """`codec`: the setting of its worker. `chunks`: bitstreams in order, to be put.

    `published`: what the prefill worker published, told from what it did before. With neither, all is computed.
    """

    name: str
    codec: str
    chunks: Sequence[bytes] = ()
    published: int = 0


@dataclass
class Answer:
    """Seconds to the first token, bytes fetched, chunks by quality, tokens computed though stored."""

    seconds: float
    bytes: int = 0
    qualities: dict[str, int] = field(default_factory=dict)
    recomputed: int = 0


@dataclass
class Mesh:
    """What runs: workers by codec setting, the store, and the way to them."""

    link: SlowLink
    channels: ChannelPool
    prompt: list[int]
    workers: dict[str, WorkerInfo]
    store: WorkerInfo
    readers: ReaderLinks = field(default_factory=ReaderLinks)

    def ticket(self, scheme: Scheme) -> KvTicket:
        info = self.workers[scheme.codec]
        return write_ticket(
            fingerprint=info.fingerprint,
            salt=f"{scheme.name} {scheme.published}",
            tokens=self.prompt[:STORED],
            layers=(info.capacity.first_layer, info.capacity.end_layer),
            sources=[ChunkSource(self.store.worker_id, self.store.address)],
            lease_id=secrets.token_hex(8),
            ttl_ms=60_000,
        )

    async def put(self, scheme: Scheme) -> None:
        """What is there already stays as it is."""
        ticket, client = self.ticket(scheme), StoreClient(self.channels)
        await client.acquire(ticket)
        for index, bits in enumerate(scheme.chunks):
            if not await client.put(ticket, index, bits, timeout=60):
                raise OSError(f"the store did not take chunk {index} of {scheme.name}")
        await client.release(ticket)

    async def publish(self, scheme: Scheme) -> Scheme:
        """The same, with KV that the prefill worker computes and puts as suits the links that readers have told of.

        What it could not put in time is missing, and computed by whoever asks.
        """
        scheme = replace(scheme, published=scheme.published + 1)
        ticket = self.ticket(scheme)
        readers = common_pb2.Readers(**asdict(self.readers.of(ticket.sources)))
        request = prefill_pb2.PrefillRequest(ticket=ticket_to_proto(ticket), readers=readers, **self._asked(PREFILL))
        stub: Any = PrefillServiceStub(self.channels.get(self.workers[PREFILL].address))
        async with stream(stub.Prefill(request, timeout=300)) as call:
            async for _ in call:
                pass
        await StoreClient(self.channels).release(ticket)
        return scheme

    async def ask(self, scheme: Scheme, budget: float | None = None) -> Answer:
        """One request. A salt of its own keeps the worker from finding the KV of the one before."""
        request = decode_pb2.DecodeRequest(
            samples=[decode_pb2.DecodeSample(index=0)],
            ticket=ticket_to_proto(self.ticket(scheme)) if scheme.chunks or scheme.published else None,
            ttft_budget_seconds=budget,
            **self._asked(scheme.codec),
        )
        stub: Any = DecodeServiceStub(self.channels.get(self.workers[scheme.codec].address))
        began, answer = time.perf_counter(), Answer(0.0)
        async with stream(stub.Decode(request, timeout=300)) as call:
            async for message in call:
                if message.HasField("started"):
                    answer = _answer(message.started)
                    self.readers.note(self.workers[scheme.codec], message.started.fetched.link_bytes_per_second)
                if message.samples:
                    return replace(answer, seconds=time.perf_counter() - began)
        raise OSError(f"{scheme.name}: no token came")

    def _asked(self, worker: str) -> dict[str, Any]:
        """Of a request for one token of the prompt; what every worker is asked."""
        sampling, stopping = sampling_to_proto(SamplingParams(max_tokens=1, temperature=0))
        return {
            "request_id": secrets.token_hex(8),
            "model": self.workers[worker].model,
            "fingerprint": self.workers[worker].fingerprint,
            "prompt_token_ids": self.prompt,
            "sampling": sampling,
            "stopping": stopping,
            "cache_salt": secrets.token_hex(8),
        }


def _answer(started: decode_pb2.DecodeStarted) -> Answer:
    fetched = started.fetched
    recomputed = max(0, started.recomputed_tokens - ASKED + 1)
    return Answer(0.0, fetched.bytes, dict(fetched.chunks_by_quality), recomputed)


@asynccontextmanager
async def running(arguments: argparse.Namespace, prompt: list[int], codecs: Sequence[str]) -> AsyncIterator[Mesh]:
    """The store within, a worker of each codec outside and one that publishes for the last of them, all registered."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-bench-")))
        link = stack.enter_context(SlowLink())
        url = f"unix://{folder}/redis.sock"
        children: list[subprocess.Popen[bytes]] = []
        stack.callback(lambda: stop(children))
        redis = [*redis_server.command(0, folder), "--unixsocket", f"{folder}/redis.sock"]
        common = {"KVMESH_REDIS_URL": url, "KVMESH_MODEL": arguments.model}
        store = {**common, "KVMESH_HOST": link.within, "KVMESH_WORKER_ID": "store", "KVMESH_MEMORY_BYTES": str(4 << 30)}
        children.append(start("redis", redis, {}, folder))
        children.append(start("store", [*link.inside, sys.executable, "-m", "kvmesh_kvstore"], store, folder))
        workers = {codec: ("kvmesh_decode", codec) for codec in codecs} | {PREFILL: ("kvmesh_prefill", codecs[-1])}
        for name, (service, codec) in workers.items():
            settings = worker(arguments, link, name, codec, common)
            children.append(start(name, [sys.executable, "-m", service], settings, folder))
        registry = Registry(url)
        names = {"store", *workers}
        infos = await ready(registry, names, children, folder)
        channels = await stack.enter_async_context(ChannelPool())
        mesh = Mesh(link, channels, prompt, infos, infos["store"])
        mesh.readers.retain([infos[codecs[-1]]])
        yield mesh
        await registry.close()


def worker(
    arguments: argparse.Namespace, link: SlowLink, name: str, codec: str, common: dict[str, str]
) -> dict[str, str]:
    settings = {"CODEC": codec, "DTYPE": DTYPE, "PRECISION": "bf16", "HOST": link.outside, "WORKER_ID": name}
    settings |= {"CODEC_PROFILE": str(arguments.profile.resolve())} if arguments.profile else {}
    settings |= {"QUALITY": str(arguments.quality)}
    settings |= {"KV_BLOCKS": str(2 * (STORED + 512) // BLOCK_TOKENS), "THREADS": str(arguments.threads)}
    return common | PROCESS | {f"KVMESH_{setting}": value for setting, value in settings.items()}


def start(name: str, command: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    return spawn(name, command, environment, folder / f"{name}.log", die_with_parent=True)[0]


def stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.kill()
    for child in children:
        child.wait()


async def ready(
    registry: Registry, names: set[str], children: Sequence[subprocess.Popen[bytes]], folder: Path
) -> dict[str, WorkerInfo]:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and all(child.poll() is None for child in children):
        with suppress(Exception):
            infos = {info.worker_id: info for info in await registry.list() if info.role is not Role.ROUTER}
            if names <= infos.keys():
                return infos
        await asyncio.sleep(0.2)
    logs = "\n".join(f"{name}: {last_lines(str(folder / f'{name}.log'), 3)}" for name in sorted(names))
    raise OSError(f"not all services came up:\n{logs}")
