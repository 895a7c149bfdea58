"""grpc.health.v1 for a server that drains.

Unlike the reference servicer it ends its watches once they have reported NOT_SERVING: an open watch would otherwise
hold up the drain for its whole grace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.errors import NotFound

SERVICE = "grpc.health.v1.Health"
_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # The package has no types.
    """Status by full service name; "" is the whole server. Belongs to one event loop."""

    def __init__(self, services: Iterable[str] = ()) -> None:
        self._serving = dict.fromkeys(["", *services], True)
        self._draining = False
        self._changed = asyncio.Event()

    def set(self, service: str, serving: bool) -> None:
        """Tells the watchers; ignored once draining."""
        if not self._draining:
            self._serving[service] = serving
            self._notify()

    def drain(self) -> None:
        """Everything is NOT_SERVING from now on."""
        self._serving = dict.fromkeys(self._serving, False)
        self._draining = True
        self._notify()

    def serving(self, service: str = "") -> bool:
        return self._serving.get(service, False)

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request.service not in self._serving:
            raise NotFound(f"no service named {request.service!r} here")
        return _Status(status=self._status(request.service))

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        last = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                yield _Status(status=status)
                last = status
                continue  # It may have changed while the message was on its way.
            if self._draining:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        serving = self._serving.get(service)
        if serving is None:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if serving else _Status.NOT_SERVING)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
