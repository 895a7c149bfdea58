"""The meters that a setting asks for: NVML's where there are accelerators, else RAPL's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from kvmesh.errors import Unavailable
from kvmesh.power import nvml
from kvmesh.power.meter import Meter, Wattmeter
from kvmesh.power.rapl import POWERCAP, RaplMeter

log = logging.getLogger(__name__)

Choice = Literal["auto", "none", "nvml", "rapl"]
Open = Callable[[], list[Meter]]


def wattmeter(
    choice: Choice, host: str, accelerators: Collection[int] | None = None, powercap: Path = POWERCAP
) -> Wattmeter | None:
    """What `choice` names; with "auto" whatever there is, NVML first, or None.

    Raises:
        Unavailable: a meter was named and cannot be read; the message says why.
    """
    return first(choice, {"nvml": lambda: _nvml(accelerators), "rapl": lambda: [RaplMeter.open(host, powercap)]})


def first(choice: Choice, kinds: dict[str, Open]) -> Wattmeter | None:
    """The first of `kinds` that opens, if `choice` leaves it open."""
    if choice == "none":
        return None
    if choice != "auto":
        return Wattmeter(kinds[choice]())
    for kind, opened in kinds.items():
        try:
            return Wattmeter(opened())
        except Unavailable as error:
            log.debug("no power from %s: %s", kind, error)
    return None


def _nvml(accelerators: Collection[int] | None) -> list[Meter]:
    library = nvml.load()
    meters: list[Meter] = [nvml.NvmlMeter(library, handle) for handle in nvml.devices(library, accelerators)]
    for meter in meters:
        meter.joules()
    return meters
