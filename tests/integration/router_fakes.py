"""A router over scripted workers: real gRPC on any port, and servicers that do as the test says.

A script is an async generator function of (request, context) that yields what the worker sends. The fake model answers
ANSWER, sample i from letter i on, so that any worker can go on from any token.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any, Self

import grpc
import grpc.aio

from kvmesh.kv.keys import fingerprint
from kvmesh.process import base
from kvmesh.registry import StaticDirectory
from kvmesh.rpc.server import Service, serve
from kvmesh.rpc.worker_service import WorkerServicer
from kvmesh.types import Role, WorkerCapacity, WorkerInfo, WorkerStatistics
from kvmesh.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    kvstore_pb2,
    kvstore_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from kvmesh_router.config import RouterConfig
from kvmesh_router.process import serve_router

ANSWER = "The quick brown fox jumps over the lazy dog."
EOS = 257
LAYOUT = {"model": "fake", "dtype": "float32"}
Script = Callable[[Any, Any], AsyncIterator[Any]]


def answer(index: int) -> list[int]:
    return [*ANSWER[index:].encode(), EOS]


def batch(index: int, offset: int, count: int, limit: int) -> common_pb2.TokenBatch:
    """The model's tokens [offset, offset + count) of a sample that may have `limit`."""
    tokens = answer(index)[offset : min(offset + count, limit)]
    end = offset + len(tokens)
    proto = common_pb2.TokenBatch(index=index, offset=offset, token_ids=tokens)
    if tokens and tokens[-1] == EOS:
        proto.finish_reason, proto.matched_stop_token = common_pb2.FINISH_REASON_STOP, EOS
    elif end >= limit:
        proto.finish_reason = common_pb2.FINISH_REASON_LENGTH
    return proto


def decoded(*batches: common_pb2.TokenBatch) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(samples=batches)


async def prefill_well(request: prefill_pb2.PrefillRequest, context: Any) -> AsyncIterator[prefill_pb2.PrefillResponse]:
    yield prefill_pb2.PrefillResponse(progress=prefill_pb2.PrefillProgress())
    yield first_tokens(request)
    yield prefill_pb2.PrefillResponse(published=prefill_pb2.PrefillPublished(chunks=len(request.ticket.chunks)))


def first_tokens(request: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillResponse:
    samples = [batch(i, 0, 1, request.stopping.max_tokens) for i in range(request.sampling.n)]
    return prefill_pb2.PrefillResponse(
        first_tokens=prefill_pb2.PrefillFirstTokens(samples=samples, queue_seconds=0.25, compute_seconds=0.5)
    )


def decode_until(tokens: int | None = None, then: Script | None = None, per_message: int = 3) -> Script:
    """Decodes well until the first sample has `tokens`, then as told (default: fails)."""

    async def script(request: decode_pb2.DecodeRequest, context: Any) -> AsyncIterator[decode_pb2.DecodeResponse]:
        yield decode_pb2.DecodeResponse()
        yield decode_pb2.DecodeResponse(started=decode_pb2.DecodeStarted(queue_seconds=0.125, fetched_tokens=7))
        at = {sample.index: len(sample.token_ids) for sample in request.samples}
        while at:
            if tokens is not None and max(at.values()) >= tokens:
                async for message in (then or die)(request, context):
                    yield message
                return
            batches = [batch(i, offset, per_message, request.stopping.max_tokens) for i, offset in at.items()]
            yield decoded(*batches)
            at = {b.index: b.offset + len(b.token_ids) for b in batches if not b.finish_reason}

    return script


decode_well = decode_until()


async def die(request: Any, context: Any) -> AsyncIterator[Any]:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker dies")
    yield


async def freeze(request: Any, context: Any) -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield


def refuse(code: grpc.StatusCode, message: str = "no") -> Script:
    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(code, message)
        yield

    return script


class FakeWorker:
    """Any of prefill, decode and kvstore. `running` counts the calls that its scripts are in."""

    def __init__(self, info: WorkerInfo, script: Script | None) -> None:
        self.info = info
        self.script = script
        self.requests: list[Any] = []
        self.released: list[str] = []
        self.running = 0

    async def play(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        self.running += 1
        try:
            assert self.script is not None
            async for message in self.script(request, context):
                yield message
        finally:
            self.running -= 1

    Prefill = Decode = play

    async def AbortPrefill(self, request: prefill_pb2.AbortPrefillRequest, context: Any) -> Any:
        self.released.append(request.ticket.lease_id)
        return prefill_pb2.AbortPrefillResponse(aborted=True)

    async def ReleaseLease(self, request: kvstore_pb2.ReleaseLeaseRequest, context: Any) -> Any:
        self.released.append(request.lease_id)
        return kvstore_pb2.ReleaseLeaseResponse(released=True)


class Prefill(FakeWorker, prefill_pb2_grpc.PrefillServiceServicer):
    Prefill = FakeWorker.play
    AbortPrefill = FakeWorker.AbortPrefill


class Decode(FakeWorker, decode_pb2_grpc.DecodeServiceServicer):
    Decode = FakeWorker.play


class KvStore(FakeWorker, kvstore_pb2_grpc.KvStoreServiceServicer):
    ReleaseLease = FakeWorker.ReleaseLease


KINDS: dict[Role, tuple[type[FakeWorker], Any, str]] = {
    Role.PREFILL: (Prefill, prefill_pb2_grpc.add_PrefillServiceServicer_to_server, "kvmesh.v1.PrefillService"),
    Role.DECODE: (Decode, decode_pb2_grpc.add_DecodeServiceServicer_to_server, "kvmesh.v1.DecodeService"),
    Role.KVSTORE: (KvStore, kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server, "kvmesh.v1.KvStoreService"),
}


class RouterMesh:
    """A router, a kvstore, and the workers that the test adds."""

    def __init__(self, **config: Any) -> None:
        self.directory = StaticDirectory()
        self._config = RouterConfig(**{"stall_timeout": 1.0, "worker_patience": 0.5, **config})
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        ground = await self._stack.enter_async_context(base(self._config, Role.ROUTER))
        self.router = await self._stack.enter_async_context(serve_router(self._config, ground, self.directory))
        channel = grpc.aio.insecure_channel(self.router.server.address)
        self.channel = await self._stack.enter_async_context(channel)
        self.inference = router_pb2_grpc.InferenceServiceStub(self.channel)
        self.operator = router_pb2_grpc.MeshServiceStub(self.channel)
        self.store = await self.add(Role.KVSTORE)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def add(
        self, role: Role, script: Script | None = None, layout: dict[str, str] = LAYOUT, model: str = "fake"
    ) -> FakeWorker:
        """Starts a worker and makes it known."""
        kind, add, name = KINDS[role]
        worker_id = f"{role}-{len(self.directory.workers(role))}"
        worker = kind(WorkerInfo(worker_id, 1, role, "", 1), script)
        status = WorkerServicer(lambda: worker.info, lambda check: WorkerStatistics(running=worker.running))
        services = [Service(name, lambda server: add(worker, server)), status.service]
        server = await self._stack.enter_async_context(serve(host="127.0.0.1", port=0, services=services))
        named = role is not Role.KVSTORE
        worker.info = WorkerInfo(
            worker_id, 1, role, server.address, 1, model if named else "", fingerprint(layout) if named else "",
            layout, WorkerCapacity(max_model_len=4096, end_layer=2),
        )  # fmt: skip
        self.directory.set([*self.directory.workers(), worker.info])
        return worker

    async def generate(self, text: str = "Hello", timeout: float = 20, **fields: Any) -> "Answer":
        """All of one stream, checked for offsets."""
        return await read(self.stream(text, timeout, **fields))

    def stream(self, text: str = "Hello", timeout: float = 20, **fields: Any) -> Any:
        return self.inference.GenerateStream(router_pb2.GenerateStreamRequest(text=text, **fields), timeout=timeout)

    async def settle(self) -> None:
        """Waits until nothing of any request is left anywhere; says what is if that takes too long."""
        flow = self.router.flow
        await until(lambda: not (len(flow.sessions) or len(flow.janitor) or flow.policy.assigned))
        assert flow.check_integrity() == []
        assert flow.gate.admission.running == flow.gate.admission.waiting == 0


class Answer:
    def __init__(self) -> None:
        self.prompt = router_pb2.PromptInfo()
        self.finish = router_pb2.FinishInfo()
        self.texts: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}

    @property
    def text(self) -> str:
        return self.texts[0]

    def reason(self, index: int = 0) -> str:
        return common_pb2.FinishReason.Name(self.finish.choices[index].reason).removeprefix("FINISH_REASON_")


async def until(condition: Callable[[], bool]) -> None:
    """Fails if it does not come true."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # The router has no events for tests.
            await asyncio.sleep(0.005)


async def read(call: Any, answer: Answer | None = None) -> Answer:
    answer = answer or Answer()
    async for message in call:
        match message.WhichOneof("event"):
            case "prompt":
                answer.prompt = message.prompt
            case "finish":
                answer.finish = message.finish
            case "delta":
                delta = message.delta
                tokens = answer.tokens.setdefault(delta.index, [])
                tokens.extend(delta.token_ids)
                assert delta.token_offset == len(tokens), "a token was lost or repeated"
                answer.texts[delta.index] = answer.texts.get(delta.index, "") + delta.text
    return answer
