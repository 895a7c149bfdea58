"""Energy and clocks of NVIDIA accelerators, by NVML. Reading is for everyone; setting a clock needs root.

The library is given: `nvidia-ml-py`'s pynvml, or whatever has the same functions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from kvmesh.errors import Unavailable

MILLI = 1e-3


class Nvml(Protocol):
    """The part of pynvml that is used. Every function may raise NVMLError; an error has `.value`, NVML's code."""

    NVMLError: type[Exception]
    NVML_ERROR_NO_PERMISSION: int
    NVML_CLOCK_SM: int

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int: ...
    def nvmlDeviceGetMaxClockInfo(self, handle: Any, clock: int) -> int: ...
    def nvmlDeviceSetGpuLockedClocks(self, handle: Any, low: int, high: int) -> None: ...
    def nvmlDeviceResetGpuLockedClocks(self, handle: Any) -> None: ...


def load() -> Nvml:
    """pynvml, if it and a driver are there.

    Raises:
        Unavailable: they are not.
    """
    try:
        library = cast(Nvml, import_module("pynvml"))
    except ImportError:
        raise Unavailable("NVML needs nvidia-ml-py: pip install 'kvmesh[power]'") from None
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        raise Unavailable(f"NVML does not start: {error}") from None
    return library


def devices(library: Nvml, indices: Collection[int] | None = None) -> list[Any]:
    """Handles of these accelerators, or of all.

    Raises:
        Unavailable: there are none, or not those.
    """
    try:
        chosen = range(library.nvmlDeviceGetCount()) if indices is None else indices
        found = [library.nvmlDeviceGetHandleByIndex(index) for index in chosen]
    except library.NVMLError as error:
        raise Unavailable(f"NVML does not know the accelerators {sorted(indices or ())}: {error}") from None
    if not found:
        raise Unavailable("NVML finds no accelerators")
    return found


@dataclass(frozen=True, slots=True)
class NvmlMeter:
    """One accelerator's energy counter (millijoules, Volta and newer)."""

    library: Nvml
    handle: Any

    @property
    def domain(self) -> str:
        return str(self.library.nvmlDeviceGetUUID(self.handle))

    def joules(self) -> float:
        try:
            return self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle) * MILLI
        except self.library.NVMLError as error:
            raise Unavailable(f"NVML gives no energy: {error}") from None


@dataclass(frozen=True, slots=True)
class NvmlClocks:
    """The clocks of a worker's accelerators."""

    library: Nvml
    handles: Sequence[Any]

    def cap(self, share: float) -> None:
        """Locks them at this share of the highest, or frees them at 1.

        Raises:
            Unavailable: clocks may not be set, or cannot on this accelerator.
        """
        for handle in self.handles:
            try:
                self._lock(handle, share)
            except self.library.NVMLError as error:
                raise Unavailable(self._refusal(error)) from None

    def _lock(self, handle: Any, share: float) -> None:
        if share >= 1:
            self.library.nvmlDeviceResetGpuLockedClocks(handle)
            return
        highest = self.library.nvmlDeviceGetMaxClockInfo(handle, self.library.NVML_CLOCK_SM)
        clock = round(highest * share)
        self.library.nvmlDeviceSetGpuLockedClocks(handle, clock, clock)

    def _refusal(self, error: Exception) -> str:
        if getattr(error, "value", None) == self.library.NVML_ERROR_NO_PERMISSION:
            return "clocks may be set by root alone: run as root, or let requests be limited instead"
        return f"the clock cannot be set: {error}"
