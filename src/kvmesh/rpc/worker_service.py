"""WorkerService: what a process says of itself. Any service offers it; this knows none of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any

import grpc.aio

from kvmesh.rpc.convert import statistics_to_proto, worker_info_to_proto
from kvmesh.rpc.server import Service
from kvmesh.types import WorkerInfo, WorkerStatistics
from kvmesh.v1 import common_pb2 as pb
from kvmesh.v1.common_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server

NAME = "kvmesh.v1.WorkerService"
Context = grpc.aio.ServicerContext[Any, Any]
ReadStatistics = Callable[[bool], WorkerStatistics | Awaitable[WorkerStatistics]]


class WorkerServicer(WorkerServiceServicer):
    """`statistics(check_integrity)` reads the process; it may raise Unavailable while starting."""

    def __init__(self, info: WorkerInfo | Callable[[], WorkerInfo], statistics: ReadStatistics) -> None:
        self._info = info
        self._statistics = statistics

    async def GetWorkerInfo(self, request: pb.GetWorkerInfoRequest, context: Context) -> pb.GetWorkerInfoResponse:
        info = self._info if isinstance(self._info, WorkerInfo) else self._info()
        return pb.GetWorkerInfoResponse(info=worker_info_to_proto(info))

    async def GetStatistics(self, request: pb.GetStatisticsRequest, context: Context) -> pb.GetStatisticsResponse:
        reading = self._statistics(request.check_integrity)
        statistics = await reading if isawaitable(reading) else reading
        return pb.GetStatisticsResponse(statistics=statistics_to_proto(statistics))

    @property
    def service(self) -> Service:
        """For `serve(services=[…])`."""
        return Service(NAME, lambda server: add_WorkerServiceServicer_to_server(self, server))
