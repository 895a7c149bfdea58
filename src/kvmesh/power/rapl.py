"""Energy of processor packages, from the kernel's power capping framework (RAPL; AMD's processors use the same zones).

Since Linux 5.10 the counters are readable by root alone, unless a udev rule opens them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from kvmesh.errors import Unavailable

POWERCAP = Path("/sys/class/powercap")
MICRO = 1e-6
PACKAGE = re.compile(r"^(intel|amd)-rapl:\d+$")
"""A package zone; zones inside it have a second number, and are part of its energy."""


@dataclass(slots=True)
class Zone:
    """One counter in microjoules, which starts again at zero after `range`."""

    path: Path
    range: int
    total: int = 0
    last: int | None = None

    def read(self) -> int:
        """Microjoules since the first reading."""
        now = _number(self.path / "energy_uj")
        if self.last is not None:
            self.total += now - self.last if now >= self.last else now + self.range - self.last
        self.last = now
        return self.total


@dataclass(slots=True)
class RaplMeter:
    """All packages of this machine together. Read it more often than a counter wraps (minutes under load)."""

    host: str
    zones: list[Zone] = field(default_factory=list)

    @classmethod
    def open(cls, host: str, root: Path = POWERCAP) -> RaplMeter:
        """Raises Unavailable where there are no counters, or they may not be read."""
        paths = sorted(path for path in root.glob("*-rapl:*") if PACKAGE.match(path.name))
        if not paths:
            raise Unavailable(f"no RAPL counters under {root}: this machine or its kernel offers none")
        meter = cls(host, [Zone(path, _number(path / "max_energy_range_uj")) for path in paths])
        meter.joules()
        return meter

    @property
    def domain(self) -> str:
        return f"{self.host}/rapl"

    def joules(self) -> float:
        return sum(zone.read() for zone in self.zones) * MICRO


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError:
        raise Unavailable(
            f"{path} may be read by root alone: run as root, or open it by a udev rule"
            f" (chmod a+r {path.parent}/energy_uj)"
        ) from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"{path} cannot be read: {error}") from None
