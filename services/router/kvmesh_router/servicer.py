"""The client's contract over `Flow` and `Status`: translation only."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc

from kvmesh.errors import InvalidArgument, Overloaded
from kvmesh.rpc.deadline import deadline_of
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1.router_pb2_grpc import InferenceServiceServicer, MeshServiceServicer
from kvmesh_router.convert import event_to_proto, response_of
from kvmesh_router.flow import Flow
from kvmesh_router.status import MeshStatus
from kvmesh_router.validation import read_submission

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(InferenceServiceServicer):
    """`default_deadline`: seconds, for clients that set none. `client_stall`: seconds that a client may not read."""

    def __init__(self, flow: Flow, status: MeshStatus, *, default_deadline: float, client_stall: float) -> None:
        self._flow = flow
        self._status = status
        self._default_deadline = default_deadline
        self._client_stall = client_stall

    async def GenerateStream(  # type: ignore[override]  # grpc.aio lets a handler write instead of yielding.
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> None:
        """Writes by itself, to bound each write."""
        deadline = deadline_of(context, self._default_deadline)
        async with aclosing(self._flow.run(read_submission(request), deadline)) as events:
            async for event in events:
                await self._write(context, event_to_proto(event))

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        deadline = deadline_of(context, self._default_deadline)
        async with aclosing(self._flow.run(read_submission(request), deadline)) as events:
            return response_of([event async for event in events])

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        if not request.request_id:
            raise InvalidArgument(violations=[("request_id", "must not be empty")])
        return pb.AbortResponse(aborted=self._flow.sessions.abort(request.request_id))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(models=await self._status.models(request.model or None))

    async def _write(self, context: Context, message: pb.GenerateStreamResponse) -> None:
        try:
            async with asyncio.timeout(self._client_stall):
                await context.write(message)
        except TimeoutError as error:
            raise Overloaded(f"the client read nothing for {self._client_stall:g} s", retry_after=0) from error


class MeshServicer(MeshServiceServicer):
    def __init__(self, status: MeshStatus) -> None:
        self._status = status

    async def GetMeshStatus(self, request: pb.GetMeshStatusRequest, context: Context) -> pb.GetMeshStatusResponse:
        return pb.GetMeshStatusResponse(workers=await self._status.workers(request.check_integrity))
