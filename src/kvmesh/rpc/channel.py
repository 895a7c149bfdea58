"""Connections to peers: one channel per address, shared by all who talk to it.

Knows addresses; neither who lives there nor whether they do.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc.aio

from kvmesh.rpc import options
from kvmesh.telemetry import Telemetry


class ChannelPool:
    """`channel_options` override those of `kvmesh.rpc.options`. With tracing each call becomes a span."""

    def __init__(self, telemetry: Telemetry | None = None, channel_options: options.Options = ()) -> None:
        self._options = options.merge(options.CHANNEL_OPTIONS, channel_options)
        self._telemetry = telemetry
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to host:port; connects with the first call."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._open(address)
        return channel

    def discard(self, address: str) -> None:
        """Closes the channel to a peer that is gone, its calls with it; the next get() starts afresh. Idempotent."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            task = asyncio.ensure_future(channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Closes every channel; calls still running are cancelled."""
        for address in list(self._channels):
            self.discard(address)
        await asyncio.gather(*self._closing)

    async def __aenter__(self) -> ChannelPool:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _open(self, address: str) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(address, options=self._options)
        if self._telemetry is None or not self._telemetry.tracing:
            return channel
        from kvmesh.rpc.tracing import TracingChannel  # Needs OpenTelemetry, which may be missing.

        return TracingChannel(channel, cast(Any, self._telemetry.tracer))
