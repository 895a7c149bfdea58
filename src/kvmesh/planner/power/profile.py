"""What one instance draws and how long it takes: by phase, tokens or batch, and clock. The shipped profiles by name.

Power is a share of the accelerators' TDP: rising with the log of the tokens in a prompt up to a ceiling, almost flat
in the batch of a decode step (Splitwise, ISCA 2024; POLCA, ASPLOS 2024). Times are linear between measured points.
Knows no plan and no request.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import log, log2
from pathlib import Path
from typing import Any

from kvmesh.errors import NotFound

DATA = Path(__file__).parents[1] / "data" / "power" / "profiles.json"

# POLCA: clocks locked to 1110 of 1410 MHz lower the peak by about 20 % and slow requests, mostly decode, by 5-7 %.
PEAK_SAVED, SLOWDOWN, LOCKED = 0.20, 0.06, 1110 / 1410

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Share of TDP: `first` for one, `doubling` more each time it doubles, at most `ceiling`."""

    first: float
    doubling: float
    ceiling: float = 1.0

    def __call__(self, amount: float) -> float:
        return min(self.ceiling, self.first + self.doubling * log2(max(amount, 1.0)))


@dataclass(frozen=True, slots=True)
class Setting:
    """What can be set on an accelerator. Factors are against the full clock; `dynamic` is of power above idle."""

    name: str
    clock: float = 1.0
    dynamic: float = 1.0
    ceiling: float = float("inf")
    prefill_time: float = 1.0
    decode_time: float = 1.0


FULL = Setting("full")


@dataclass(frozen=True, slots=True)
class PowerProfile:
    """One model on one instance of `accelerators` in tensor parallel; `idle`, `prefill` and `decode` are shares of TDP.

    `prompt_seconds` maps prompt tokens, `step_seconds` sequences in a decode step, to seconds.
    """

    name: str
    accelerators: int
    tdp_watts: float
    idle: float
    clock_mhz: float
    prefill: Curve
    decode: Curve
    prompt_seconds: Points
    step_seconds: Points
    origin: str

    @property
    def provisioned_watts(self) -> float:
        return self.accelerators * self.tdp_watts

    @property
    def idle_watts(self) -> float:
        return self.provisioned_watts * self.idle

    def prefill_watts(self, tokens: float, setting: Setting = FULL) -> float:
        """While a prompt of `tokens` is computed."""
        return self._watts(max(self.prefill(tokens), self.decode(1)), setting)

    def decode_watts(self, batch: float, setting: Setting = FULL) -> float:
        """While `batch` sequences get a token each."""
        return self._watts(self.decode(batch), setting)

    def _watts(self, share: float, setting: Setting) -> float:
        lowered = self.idle + (share - self.idle) * setting.dynamic
        return self.provisioned_watts * min(max(lowered, self.idle), setting.ceiling)

    def prefill_seconds(self, tokens: float, setting: Setting = FULL) -> float:
        return _interpolate(self.prompt_seconds, tokens) * setting.prefill_time

    def decode_seconds(self, batch: float, setting: Setting = FULL) -> float:
        """Of one step."""
        return _interpolate(self.step_seconds, batch) * setting.decode_time

    def locked(self, mhz: float) -> Setting:
        """A locked clock, by POLCA's published pair: dynamic power is a power of the clock, prefill time its inverse,
        and of a decode step a fixed share is."""
        ratio = mhz / self.clock_mhz
        exponent = log(1 - PEAK_SAVED / (1 - self.idle)) / log(LOCKED)
        bound = SLOWDOWN / (1 / LOCKED - 1)
        return Setting(f"{mhz:g} MHz", ratio, ratio**exponent, float("inf"), 1 / ratio, 1 + bound * (1 / ratio - 1))


def capped(share: float, prefill_time: float = 1.3) -> Setting:
    """A power limit of `share` of TDP: Splitwise's capped H100s take 1.30 times as long for prompts, not for tokens."""
    return Setting(f"{share:.0%} of TDP", ceiling=share, prefill_time=prefill_time)


def _interpolate(points: Points, x: float) -> float:
    """Linear through the points; flat before the first, going on as it was after the last."""
    right = min(max(bisect_left(points, (x,)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (max(x, points[0][0]) - x0) / (x1 - x0)


@cache
def profiles() -> Mapping[str, PowerProfile]:
    """Those that ship: ACCELERATOR/MODEL/TENSOR-PARALLEL."""
    return {entry["name"]: _profile(entry) for entry in json.loads(DATA.read_text())["profiles"]}


def profile(name: str) -> PowerProfile:
    """Raises NotFound, naming those that are known."""
    known = profiles()
    if name not in known:
        raise NotFound(f"no power profile {name!r}: there are {', '.join(known)}")
    return known[name]


def _profile(entry: Mapping[str, Any]) -> PowerProfile:
    return PowerProfile(
        name=entry["name"],
        accelerators=entry["accelerators"],
        tdp_watts=entry["tdp_watts"],
        idle=entry["idle"],
        clock_mhz=entry["clock_mhz"],
        prefill=Curve(*entry["prefill"]),
        decode=Curve(*entry["decode"]),
        prompt_seconds=_seconds(entry["prompt_ms"]),
        step_seconds=_seconds(entry["step_ms"]),
        origin=entry["origin"],
    )


def _seconds(points: Sequence[tuple[float, float]]) -> Points:
    return tuple((x, milliseconds / 1e3) for x, milliseconds in points)


def assumed(name: str, tdp_watts: float, like: PowerProfile, accelerators: int = 1) -> PowerProfile:
    """For an accelerator nobody measured: shares and times of `like`, at another TDP."""
    origin = f"assumed: the shares of {like.name}"
    return replace(like, name=name, tdp_watts=tdp_watts, accelerators=accelerators, origin=origin)
