"""A mesh of real servers on port 0 whose handlers are plain functions over bytes."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio
import pytest

from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.server import Server, Service, serve
from kvmesh.telemetry import Telemetry

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Mesh:
    """`await mesh.serve(unary_stream=handler)` then `mesh.call(server, "unary_stream")(b"…")`."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._pools: dict[int, ChannelPool] = {}

    async def serve(
        self, *, telemetry: Telemetry | None = None, port: int = 0, **handlers: Callable[..., Any]
    ) -> Server:
        services = [Service("test.Echo", lambda server: add(server, handlers))]
        return await self.serve_services(services, telemetry=telemetry, port=port)

    async def serve_services(
        self, services: list[Service], *, telemetry: Telemetry | None = None, port: int = 0
    ) -> Server:
        return await self._stack.enter_async_context(
            serve(host="127.0.0.1", port=port, services=services, telemetry=telemetry)
        )

    def pool(self, telemetry: Telemetry | None = None) -> ChannelPool:
        if id(telemetry) not in self._pools:
            self._pools[id(telemetry)] = ChannelPool(telemetry)
        return self._pools[id(telemetry)]

    def call(self, server: Server, kind: str, telemetry: Telemetry | None = None) -> Callable[..., Any]:
        """Streaming requests are given as one message."""
        channel = self.pool(telemetry).get(server.address)
        method = getattr(channel, kind)(f"/test.Echo/{kind}")
        if kind.startswith("unary"):
            return lambda request=b"", **options: method(request, **options)
        return lambda request=b"", **options: method(_once(request), **options)

    async def close(self) -> None:
        for pool in self._pools.values():
            await pool.close()


def add(server: grpc.aio.Server, handlers: dict[str, Callable[..., Any]]) -> None:
    made = {kind: getattr(grpc, f"{kind}_rpc_method_handler")(handler) for kind, handler in handlers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", made),))


async def _once(message: bytes) -> AsyncIterator[bytes]:
    yield message


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        stack.push_async_callback(mesh.close)
        yield mesh
