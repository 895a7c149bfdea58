"""A serving process: binds, answers health and reflection beside its own services, and drains.

Knows no servicer: what it serves is given as (full name, how to add it).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvmesh.errors import Unavailable
from kvmesh.rpc import health, options
from kvmesh.rpc.interceptors import ErrorInterceptor
from kvmesh.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Service:
    """`Service("kvmesh.v1.DecodeService", lambda server: add_DecodeServiceServicer_to_server(servicer, server))`"""

    name: str
    add: Callable[[grpc.aio.Server], None]


class Server:
    """What `serve` yields. `address` is the host:port actually bound. Stays alive as long as this is referenced."""

    def __init__(self, server: grpc.aio.Server, address: str, health: health.Health) -> None:
        self._server = server
        self.address = address
        self.health = health

    async def drain(self, grace: float) -> None:
        """NOT_SERVING at once, new calls refused, running ones have `grace` seconds before they are cancelled.

        Returns as soon as the last call has ended. Idempotent.
        """
        self.health.drain()
        await self._server.stop(grace)


@asynccontextmanager
async def serve(
    *,
    host: str,
    port: int,
    services: Sequence[Service],
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    telemetry: Telemetry | None = None,
    server_options: options.Options = (),
) -> AsyncIterator[Server]:
    """Serves until the block is left, then stops at once: call `drain` first to be graceful. `port` 0 takes any.

    Raises:
        Unavailable: the port cannot be bound.
    """
    server = grpc.aio.server(
        interceptors=[*_tracing(telemetry), ErrorInterceptor(), *interceptors],
        options=options.merge(options.SERVER_OPTIONS, server_options),
    )
    names = [service.name for service in services]
    servicer = health.Health(names)
    for service in services:
        service.add(server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection([*names, health.SERVICE, reflection.SERVICE_NAME], server)
    bound = Server(server, _address(host, _bind(server, host, port)), servicer)
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    try:
        return server.add_insecure_port(_address(host, port))
    except RuntimeError as error:
        raise Unavailable(f"cannot listen on {host}:{port}: the address is in use or not this machine's") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tracing(telemetry: Telemetry | None) -> list[grpc.aio.ServerInterceptor]:
    if telemetry is None or not telemetry.tracing:
        return []
    from kvmesh.rpc.tracing import TracingServerInterceptor  # Needs OpenTelemetry, which may be missing.

    return [TracingServerInterceptor(cast(Any, telemetry.tracer))]
