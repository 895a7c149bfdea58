"""The asynchronous client: one channel to a router, streams that cancel when they are left.

Knows no terminal and no default address; failures leave as the errors of `kvmesh.errors`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from kvmesh.client.events import (
    Completion,
    Event,
    ModelInfo,
    WorkerStatus,
    completion_from_proto,
    event_from_proto,
    model_from_proto,
    status_from_proto,
)
from kvmesh.client.requests import Message, Options, build_request
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.stream import stream, unary
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1.router_pb2_grpc import InferenceServiceStub, MeshServiceStub

if TYPE_CHECKING:
    from kvmesh.v1.router_pb2_grpc import InferenceServiceAsyncStub

STATUS_TIMEOUT = 10.0


class AsyncStream:
    """The events of one generation, in order: PromptInfo, Delta..., Finish.

    The call begins with the first event asked for. Leaving the context, or dropping the stream, cancels it.
    """

    def __init__(self, client: AsyncClient, request: pb.GenerateStreamRequest, timeout: float | None) -> None:
        self._client = client
        self._events = client._events(request, timeout)
        self.request_id = request.request_id

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._events.aclose()

    async def abort(self) -> bool:
        """Asks the router to end it: the stream then closes with FinishReason.ABORTED. False: it was not running."""
        return await self._client.abort(self.request_id)


class AsyncClient:
    """A client of the router at `address` (host:port), to be used in one event loop.

    ::

        async with AsyncClient("127.0.0.1:50051") as client:
            async with client.generate("Once upon a time", max_tokens=32) as stream:
                async for event in stream:
                    ...
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channels = ChannelPool()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channels.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        chat: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Streams a generation from a prompt (used as it is), chat messages (templated) or token ids.

        `timeout`: seconds for the whole of it; default the router's.

        Raises:
            InvalidArgument: not exactly one input, or values the wire cannot carry. Errors of the router are raised
                by the stream, with the statuses that `router.proto` lists.
        """
        request = build_request(pb.GenerateStreamRequest, prompt, chat, token_ids, options)
        return AsyncStream(self, request, timeout)

    async def complete(
        self,
        prompt: str | None = None,
        *,
        chat: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """The same in one reply."""
        request = build_request(pb.GenerateRequest, prompt, chat, token_ids, options)
        return completion_from_proto(await unary(self._inference().Generate(request, timeout=timeout)))

    async def abort(self, request_id: str) -> bool:
        """Ends a running request; False if there is none."""
        call = self._inference().Abort(pb.AbortRequest(request_id=request_id), timeout=STATUS_TIMEOUT)
        return (await unary(call)).aborted

    async def models(self, model: str | None = None) -> list[ModelInfo]:
        """What the mesh serves; NotFound if `model` is named and unknown."""
        call = self._inference().GetModelInfo(pb.GetModelInfoRequest(model=model), timeout=STATUS_TIMEOUT)
        return [model_from_proto(message) for message in (await unary(call)).models]

    async def status(self, check: bool = False) -> list[WorkerStatus]:
        """Every process that the router knows of; `check` also runs the integrity check of each pool."""
        stub = MeshServiceStub(self._channels.get(self.address))
        call = stub.GetMeshStatus(pb.GetMeshStatusRequest(check_integrity=check), timeout=STATUS_TIMEOUT)
        return [status_from_proto(message) for message in (await unary(call)).workers]

    def _inference(self) -> InferenceServiceAsyncStub:
        return InferenceServiceStub(self._channels.get(self.address))

    async def _events(self, request: pb.GenerateStreamRequest, timeout: float | None) -> AsyncGenerator[Event]:
        async with stream(self._inference().GenerateStream(request, timeout=timeout)) as call:
            async for message in call:
                if (event := event_from_proto(message)) is not None:
                    yield event
