"""How long a prompt or a decode step will take, learnt from the timings that travel in replies.

Linear models, the forms of DistServe (OSDI'24, `evaluation/1-fit-time-usage`), with the square of the prompt's length
split at the cached prefix. From a guess they are fitted by recursive least squares on relative error, which slowly
forgets; from a profile only their scale is followed. Pure Python: three coefficients need no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

FORGETTING = 0.998
"""Weight of a measurement relative to the next one."""
NOISE = 0.05
"""Variance of the relative error of one measurement."""
UNSURE = 100.0
"""Variance of coefficients that are a guess, relative to their size."""
SMOOTHING = 0.05
LARGEST = 1.0
"""Relative error from which a measurement counts as an outlier."""

Coefficients = tuple[float, float, float]


@dataclass(slots=True)
class Line:
    """seconds = scale * coefficients · features, refined by each measurement that is a positive number.

    `trusted` coefficients come from a profile: measurements then move the scale alone, which noise cannot bend.
    """

    coefficients: list[float]
    units: Sequence[float]
    """Typical size of each feature: makes them comparable."""
    trusted: bool = False
    scale: float = 1.0
    measured: int = 0
    """How many measurements it has seen; a profile counts as one."""
    _covariance: list[list[float]] = field(default_factory=list)
    _unsure: float = 0.0

    def __post_init__(self) -> None:
        sizes = [c * unit for c, unit in zip(self.coefficients, self.units, strict=True)]
        self._covariance = [
            [UNSURE * size * size if row == col else 0.0 for col in range(len(sizes))] for row, size in enumerate(sizes)
        ]
        self._unsure = self._trace()
        self.measured = int(self.trusted)

    def predict(self, features: Sequence[float]) -> float:
        """Never negative: no coefficient is."""
        return self.scale * sum(c * f for c, f in zip(self.coefficients, features, strict=True))

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """A measurement of any size counts alike: errors are relative, and one outlier moves little."""
        if not (isfinite(seconds) and seconds > 0):
            return
        self.measured += 1
        error = max(-LARGEST, min(LARGEST, 1.0 - self.predict(features) / seconds))
        if self.trusted:
            self.scale *= 1.0 + SMOOTHING * error
        else:
            self._refine([f / unit / seconds for f, unit in zip(features, self.units, strict=True)], error)

    def _refine(self, x: Sequence[float], error: float) -> None:
        """One step of recursive least squares."""
        gain = [sum(c * value for c, value in zip(row, x, strict=True)) for row in self._covariance]
        denominator = NOISE + sum(value * g for value, g in zip(x, gain, strict=True))
        for i, g in enumerate(gain):
            self.coefficients[i] = max(0.0, self.coefficients[i] + g * error / denominator / self.units[i])
        for i, row in enumerate(self._covariance):
            for j, g in enumerate(gain):
                row[j] -= gain[i] * g / denominator
        if self._trace() < FORGETTING * self._unsure:
            self._covariance = [[value / FORGETTING for value in row] for row in self._covariance]

    def _trace(self) -> float:
        return sum(row[i] for i, row in enumerate(self._covariance))


@dataclass(slots=True)
class PrefillTime:
    """seconds = a + b · computed + c · ((cached + computed)² - cached²), in tokens."""

    line: Line

    def predict(self, computed: float, cached: float = 0.0) -> float:
        return self.line.predict((1.0, computed, computed * (computed + 2 * cached)))

    def observe(self, computed: float, cached: float, seconds: float) -> None:
        if computed > 0:
            self.line.observe((1.0, computed, computed * (computed + 2 * cached)), seconds)


@dataclass(slots=True)
class StepTime:
    """Seconds of one decode step = a + b · context tokens of the whole batch + c · sequences."""

    line: Line

    def predict(self, context: float, batch: float) -> float:
        return self.line.predict((1.0, context, batch))

    def observe(self, context: float, batch: float, seconds: float) -> None:
        if batch > 0:
            self.line.observe((1.0, context, batch), seconds)


PREFILL_UNITS = (1.0, 1e3, 1e6)
STEP_UNITS = (1.0, 1e4, 1e1)


@dataclass(frozen=True, slots=True)
class Profile:
    """Coefficients to begin with, seconds; the defaults are a small accelerator's, and soon overruled."""

    prefill: Coefficients = (0.01, 2e-4, 5e-9)
    step: Coefficients = (0.02, 5e-7, 1e-4)
    transfer: tuple[float, float] = (2e-3, 1e-6)
    measured: bool = False
    """The coefficients come from a measurement of such a worker."""


@dataclass(slots=True)
class Times:
    """The models of one worker."""

    prefill: PrefillTime
    step: StepTime
    transfer: Line

    @classmethod
    def of(cls, profile: Profile) -> Times:
        trusted = profile.measured
        return cls(
            PrefillTime(Line(list(profile.prefill), PREFILL_UNITS, trusted)),
            StepTime(Line(list(profile.step), STEP_UNITS, trusted)),
            Line(list(profile.transfer), (1.0, 1e3), trusted),
        )

    @property
    def measured(self) -> int:
        """Prompts and decodes that these models have seen."""
        return self.prefill.line.measured + self.step.line.measured

    def profile(self) -> Profile:
        """What another worker, not yet measured, may begin with."""
        lines = (self.prefill.line, self.step.line, self.transfer)
        (a, b, c), (d, e, f), (g, h) = ([line.scale * one for one in line.coefficients] for line in lines)
        return Profile((a, b, c), (d, e, f), (g, h))
