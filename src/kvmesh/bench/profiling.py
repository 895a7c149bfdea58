"""How fast one live worker computes prompts and decodes: measured over gRPC, from outside, while it is otherwise idle.

A prompt's time is that to its first token. A decode step's is measured with `batch` streams at once, whose prompts were
computed before and lie in the worker's prefix cache, between the moment when all of them run and the end of the first.
Knows no model of latency: points in, points out (`kvmesh.planner.latency.measured`).
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from kvmesh.errors import InvalidArgument, KvmeshError, Unavailable
from kvmesh.planner.latency.measured import DecodePoint, PrefillPoint, Profile
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.convert import sampling_to_proto, worker_info_from_proto
from kvmesh.rpc.stream import stream, unary
from kvmesh.types import Role, SamplingParams, WorkerInfo
from kvmesh.v1 import common_pb2, common_pb2_grpc, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

LOW_ID, HIGH_ID = 32, 127
"""Random tokens are drawn from ids that every vocabulary has."""
TIMEOUT = 300.0
MARGIN = 16
"""Decode steps on either side of those that are counted."""
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured: prompts of `lengths`, decode steps of `batches` sequences of each of `contexts` tokens."""

    lengths: Sequence[int]
    batches: Sequence[int]
    contexts: Sequence[int]
    repeats: int = 3
    steps: int = 32

    def decode_points(self, kv_tokens: int, max_running: int) -> list[tuple[int, int]]:
        """Those that the worker has room for."""
        each = self.steps + 2 * MARGIN
        pairs = [(batch, context) for batch in self.batches for context in self.contexts]
        return [(b, c) for b, c in pairs if b <= max_running and b * (c + each) <= 0.9 * kv_tokens]


def geometric(low: int, high: int, points: int) -> list[int]:
    """Whole numbers from low to high, at about equal ratios."""
    steps = [low * (high / low) ** (i / max(1, points - 1)) for i in range(points)]
    return sorted({round(step) for step in steps})


@dataclass(slots=True)
class _Watched:
    """A decode stream: when its messages came, and how many tokens had come by then."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def note(self, tokens: int) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(tokens + (self.counts[-1] if self.counts else 0))

    def within(self, begin: float, end: float) -> Iterator[tuple[float, int]]:
        return ((at, count) for at, count in zip(self.times, self.counts, strict=True) if begin <= at <= end)


class Profiler:
    """Measures the worker at host:port. `progress` is told after each measurement."""

    def __init__(self, channels: ChannelPool, address: str, progress: Progress = lambda what: None) -> None:
        channel = channels.get(address)
        self._worker = common_pb2_grpc.WorkerServiceStub(channel)
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
        self._decode = decode_pb2_grpc.DecodeServiceStub(channel)
        self._progress = progress
        self._chance = random.Random(0)
        self.info = WorkerInfo("", 0, Role.ROUTER, address, 0)

    async def connect(self) -> WorkerInfo:
        """Who is there.

        Raises:
            InvalidArgument: a process that computes nothing.
        """
        response = await unary(self._worker.GetWorkerInfo(common_pb2.GetWorkerInfoRequest(), timeout=10.0))
        self.info = worker_info_from_proto(response.info)
        if not (self.info.role.prefills or self.info.role.decodes):
            raise InvalidArgument(f"{self.info.address} is a {self.info.role}: name a prefill or decode worker")
        return self.info

    async def run(self, grid: Grid, token_budget: int) -> Profile:
        """The whole grid; call `connect` first. The worker should serve nobody else meanwhile."""
        capacity = self.info.capacity
        room = capacity.blocks * capacity.block_tokens
        longest = min(capacity.max_model_len, room) - 2
        await self._first_token(self._tokens(min(grid.lengths)))
        prefill = []
        for length in sorted({min(length, longest) for length in grid.lengths}):
            seconds = [await self._first_token(self._tokens(length)) for _ in range(grid.repeats)]
            prefill.append(PrefillPoint(length, median(seconds)))
            self._progress(f"prompt of {length} tokens: {median(seconds) * 1e3:.1f} ms")
        decode = []
        for batch, context in grid.decode_points(room, capacity.max_running) if self.info.role.decodes else ():
            decode.append(await self._step(batch, min(context, longest - grid.steps - 2 * MARGIN), grid.steps))
            self._progress(f"batch of {batch}, {context} tokens each: {decode[-1].seconds * 1e3:.1f} ms")
        return Profile(self.info.worker_id, self.info.model, room, token_budget, tuple(prefill), tuple(decode))

    # Prompts -----------------------------------------------------------------------------------------------------

    async def _first_token(self, tokens: Sequence[int], salt: str | None = None) -> float:
        """Seconds from sending a prompt to its first token."""
        began = time.perf_counter()
        if self.info.role.decodes:
            await self._watch(tokens, 1, salt or secrets.token_hex(8))
            return time.perf_counter() - began
        sampling, stopping = sampling_to_proto(_params(1))
        request = prefill_pb2.PrefillRequest(
            **self._common(tokens, salt or secrets.token_hex(8)), sampling=sampling, stopping=stopping
        )
        async with stream(self._prefill.Prefill(request, timeout=TIMEOUT)) as call:
            async for message in call:
                if message.HasField("first_tokens"):
                    return message.first_tokens.compute_seconds or time.perf_counter() - began
        raise Unavailable(f"{self.info.worker_id} ended a prompt without a token")

    # Steps -------------------------------------------------------------------------------------------------------

    async def _step(self, batch: int, context: int, steps: int) -> DecodePoint:
        """Mean seconds of a step while all streams run."""
        salt = secrets.token_hex(8)
        prompts = [self._tokens(context) for _ in range(batch)]
        for prompt in prompts:
            await self._first_token(prompt, salt)
        wanted = steps + 2 * MARGIN
        watched = await asyncio.gather(*(self._watch(prompt, wanted, salt) for prompt in prompts))
        begin = max(one.times[0] for one in watched)
        end = min(one.times[-1] for one in watched)
        seconds, counts = [], []
        for one in watched:
            inside = list(one.within(begin, end))
            if len(inside) >= 2 and (gained := inside[-1][1] - inside[0][1]):
                seconds.append((inside[-1][0] - inside[0][0]) / gained)
                counts.append((inside[-1][1] + inside[0][1]) / 2)
        if not seconds:
            raise KvmeshError(f"a batch of {batch} never ran together: other requests keep {self.info.worker_id} busy")
        return DecodePoint(batch, round(batch * (context + sum(counts) / len(counts))), median(seconds))

    async def _watch(self, tokens: Sequence[int], wanted: int, salt: str) -> _Watched:
        """Decodes `wanted` tokens, its prompt included in what the worker computes."""
        sampling, stopping = sampling_to_proto(_params(wanted))
        request = decode_pb2.DecodeRequest(
            **self._common(tokens, salt),
            sampling=sampling,
            stopping=stopping,
            samples=[decode_pb2.DecodeSample(index=0)],
        )
        watched = _Watched()
        async with stream(self._decode.Decode(request, timeout=TIMEOUT)) as call:
            async for message in call:
                if gained := sum(len(sample.token_ids) for sample in message.samples):
                    watched.note(gained)
        if not watched.times:
            raise Unavailable(f"{self.info.worker_id} ended a stream without a token")
        return watched

    def _tokens(self, count: int) -> list[int]:
        return self._chance.choices(range(LOW_ID, HIGH_ID), k=count)

    def _common(self, tokens: Sequence[int], salt: str) -> dict[str, Any]:
        info = self.info
        return {
            "request_id": f"profile-{secrets.token_hex(8)}",
            "model": info.model,
            "fingerprint": info.fingerprint,
            "prompt_token_ids": tokens,
            "cache_salt": salt,
        }


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, min_tokens=tokens, temperature=0.0, ignore_eos=True)
