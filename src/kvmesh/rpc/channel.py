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
        self._closing: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to host:port; connects with the first call."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._open(address)
        return channel

    def discard(self, address: str, grace: float | None = None) -> None:
        """Closes the channel to a peer that is gone; the next get() starts afresh. Idempotent.

        Its calls are cancelled after `grace` seconds, at once without: a peer that drains still has some to end.
        """
        channel = self._channels.pop(address, None)
        if channel is not None:
            task = asyncio.ensure_future(channel.close(grace))
            self._closing[task] = channel
            task.add_done_callback(lambda done: self._closing.pop(done, None))

    async def close(self) -> None:
        """Closes every channel; calls still running are cancelled."""
        channels = [*self._channels.values(), *self._closing.values()]
        self._channels.clear()
        for task in list(self._closing):
            task.cancel()
        await asyncio.gather(*(channel.close() for channel in channels))

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
