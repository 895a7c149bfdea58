"""Joules, grams and dollars of a deployment over a stretch of time, from how long each instance was busy.

What a simulation reports as busy seconds and tokens is priced here by power profiles. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvmesh.planner.power.operation import Prices
from kvmesh.planner.power.profile import FULL, PowerProfile, Setting
from kvmesh.planner.simulator.outcome import Outcome, Usage

JOULES_IN_KWH = 3.6e6
SECONDS_IN_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Busy:
    """What one instance did: seconds on, seconds computing prompts and steps, and their mean sizes."""

    profile: PowerProfile
    on_seconds: float
    prefill_seconds: float
    decode_seconds: float
    mean_prompt: float
    mean_batch: float
    setting: Setting = FULL
    dollars_per_hour: float = 0.0

    @property
    def joules(self) -> float:
        """Idle watts while on and not busy, the phase's watts while busy."""
        idle = self.on_seconds - self.prefill_seconds - self.decode_seconds
        return (
            self.profile.idle_watts * max(idle, 0.0)
            + self.profile.prefill_watts(self.mean_prompt, self.setting) * self.prefill_seconds
            + self.profile.decode_watts(self.mean_batch, self.setting) * self.decode_seconds
        )


@dataclass(frozen=True, slots=True)
class Energy:
    """Totals, and for each output token."""

    joules: float
    grams: float
    dollars: float
    output_tokens: int

    @property
    def joules_per_token(self) -> float:
        """NaN where there were no tokens."""
        return self.joules / self.output_tokens if self.output_tokens else float("nan")


def energy(instances: Iterable[Busy], output_tokens: int, prices: Prices = Prices()) -> Energy:
    """Of all instances together."""
    instances = list(instances)
    joules = sum(instance.joules for instance in instances)
    rent = sum(instance.dollars_per_hour * instance.on_seconds / SECONDS_IN_HOUR for instance in instances)
    kwh = joules / JOULES_IN_KWH
    return Energy(joules, kwh * prices.grams_per_kwh, rent + kwh * prices.dollars_per_kwh, output_tokens)


def simulated(outcome: Outcome, profile_of: Callable[[str], PowerProfile], prices: Prices = Prices()) -> Energy:
    """Of a simulated run; `profile_of` names each instance's profile. All instances are on from beginning to end."""
    ended = [request.finish for request in outcome.requests if request.finish < float("inf")]
    seconds = max(ended, default=0.0) - min((request.arrival for request in outcome.requests), default=0.0)
    prompts = [request.prompt_tokens for request in outcome.requests]
    mean_prompt = sum(prompts) / max(1, len(prompts))
    busy = [_busy(usage, profile_of(usage.name), max(seconds, usage.busy), mean_prompt) for usage in outcome.instances]
    return energy(
        busy, sum(request.output_tokens for request in outcome.requests if request.finish < float("inf")), prices
    )


def _busy(usage: Usage, profile: PowerProfile, seconds: float, mean_prompt: float) -> Busy:
    """The busy time, divided between the phases as the profile would divide their tokens."""
    batch = max(1.0, usage.batch_seconds / usage.busy) if usage.busy else 1.0
    prefill = usage.prompt_tokens / max(1.0, mean_prompt) * profile.prefill_seconds(mean_prompt)
    decode = usage.output_tokens / batch * profile.decode_seconds(batch)
    share = prefill / (prefill + decode) if prefill + decode else 0.0
    return Busy(profile, seconds, usage.busy * share, usage.busy * (1 - share), mean_prompt, batch)
