"""Operating points: what an instance does in a second, and draws, at a setting and a batch. Columns of a program.

A point is one way to run an instance: seconds of it that a prompt token and an output token take, and the watts while
they do. Built from power profiles, or given by any other cost model. Knows no request and no cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvmesh.planner.power.profile import FULL, PowerProfile, Setting

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Seconds and watts of one instance. `prefill_use` is the share of its time that prompts may take, for their queue
    to stay short; below a busy share of `least` its batch would be that of a smaller point."""

    name: str
    prefill_seconds: float
    """Of a prompt token."""
    decode_seconds: float
    """Of an output token: a step, divided by its batch."""
    prefill_watts: float
    decode_watts: float
    idle_watts: float
    step_seconds: float
    prefill_use: float = 1.0
    least: float = 0.0

    @property
    def prefill_joules(self) -> float:
        """Of a prompt token, above idle."""
        return (self.prefill_watts - self.idle_watts) * self.prefill_seconds

    @property
    def decode_joules(self) -> float:
        """Of an output token, above idle."""
        return (self.decode_watts - self.idle_watts) * self.decode_seconds


@dataclass(frozen=True, slots=True)
class Limits:
    """What the mean request may take, in seconds; infinite where nothing is promised."""

    ttft: float = float("inf")
    tpot: float = float("inf")

    def use(self, prompt_seconds: float) -> float:
        """The highest utilisation at which an M/D/1 queue in front of the prompts keeps a mean TTFT of half the limit:
        W = u p / (2 (1 - u)) <= ttft/2 - p. At most 0.95."""
        room = self.ttft / 2 - prompt_seconds
        return min(0.95, 2 * room / (2 * room + prompt_seconds)) if room > 0 else 0.0


def operating_points(
    profile: PowerProfile,
    prompt_tokens: float,
    limits: Limits,
    settings: Sequence[Setting] = (FULL,),
    batches: Iterable[int] = BATCHES,
) -> tuple[OperatingPoint, ...]:
    """Those that keep the limits for a mean prompt. A step may take `tpot` less what the prompts between steps take."""
    return tuple(_points(profile, prompt_tokens, limits, settings, tuple(batches)))


def _points(
    profile: PowerProfile, tokens: float, limits: Limits, settings: Sequence[Setting], batches: Sequence[int]
) -> Iterator[OperatingPoint]:
    for setting in settings:
        prompt = profile.prefill_seconds(tokens, setting)
        use = limits.use(prompt)
        below = 0.0
        for batch in batches:
            step = profile.decode_seconds(batch, setting)
            if use > 0 and step <= limits.tpot:
                yield OperatingPoint(
                    name=f"{setting.name}, batch {batch}",
                    prefill_seconds=prompt / tokens,
                    decode_seconds=step / batch,
                    prefill_watts=profile.prefill_watts(tokens, setting),
                    decode_watts=profile.decode_watts(batch, setting),
                    idle_watts=profile.idle_watts,
                    step_seconds=step,
                    prefill_use=use,
                    least=below * step / batch,
                )
            below = batch / step
