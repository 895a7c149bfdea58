"""KV on its way between host and device: pinned memory and a stream of its own, beside what is being computed.

Whoever reads blocks that are still being written asks `fence` first. Knows no layout. Buffers come from torch's cache
of pinned memory, so that no call but the first of its size pays for pinning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """True if the stream has passed it."""

    def wait(self) -> None:
        """Has the computing stream wait until it has."""

    def synchronize(self) -> None:
        """Waits until it has."""


class Staging(Protocol):
    """Moves tensors; nothing waits but `result` of a download."""

    def upload(self, blocks: Collection[int], host: Tensor, put: Callable[[Tensor], None]) -> None:
        """Has `put` write a copy of `host` on the device into `blocks`."""

    def download(self, device: Tensor) -> Download:
        """Begins to copy a tensor that nobody else will change."""

    def fence(self, blocks: Iterable[int]) -> None:
        """What is computed after this sees uploads to these blocks."""


@dataclass(frozen=True, slots=True)
class Download:
    """A copy on the host, once `event` has happened."""

    host: Tensor
    event: Event | None = None

    def result(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.host


class InFlight:
    """Uploads that the computing stream has not been told to wait for."""

    def __init__(self) -> None:
        self._uploads: list[tuple[frozenset[int], Event]] = []

    def add(self, blocks: Collection[int], event: Event) -> None:
        self._uploads.append((frozenset(blocks), event))

    def take(self, blocks: Iterable[int]) -> list[Event]:
        """The events to wait for before these blocks are read; forgets them, and those that have happened."""
        if not self._uploads:
            return []
        wanted = frozenset(blocks)
        met = [event for written, event in self._uploads if not wanted.isdisjoint(written)]
        self._uploads = [
            (written, event) for written, event in self._uploads if wanted.isdisjoint(written) and not event.query()
        ]
        return met


class DirectStaging:
    """Implements `Staging` at once, on any device."""

    def upload(self, blocks: Collection[int], host: Tensor, put: Callable[[Tensor], None]) -> None:
        put(host)

    def download(self, device: Tensor) -> Download:
        return Download(device.cpu())

    def fence(self, blocks: Iterable[int]) -> None:
        """Nothing is ever on its way."""


class CudaStaging:
    """Implements `Staging` with a side stream."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._in_flight = InFlight()

    def upload(self, blocks: Collection[int], host: Tensor, put: Callable[[Tensor], None]) -> None:
        pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            put(pinned.to(self._device, non_blocking=True))
            self._in_flight.add(blocks, self._side.record_event())

    def download(self, device: Tensor) -> Download:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            pinned = torch.empty(device.shape, dtype=device.dtype, pin_memory=True)
            pinned.copy_(device, non_blocking=True)
            device.record_stream(self._side)
            return Download(pinned, self._side.record_event())

    def fence(self, blocks: Iterable[int]) -> None:
        for event in self._in_flight.take(blocks):
            event.wait()


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A copy on the device of the current stream's work; nothing waits for it."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def staging_for(device: torch.device | str) -> Staging:
    """The way to and from this device."""
    return CudaStaging(device) if torch.device(device).type == "cuda" else DirectStaging()
