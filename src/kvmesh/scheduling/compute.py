"""How long a prompt takes to compute, learnt from prompts computed: so much a token, and so much a pair of tokens.

The pairs are attention's: token i reads i others. Least squares of the relative error, recent measurements first, no
coefficient below zero; what is far from all that was measured is taken for worse. Pure; knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass

DECAY = 0.9
"""What earlier measurements weigh after one more."""
FEWEST_TOKENS = 16
"""Below this the time is a step's overhead, and says nothing of a prompt."""
FAR = 4
"""A prompt so many times as long as any measured is guessed at, and taken to be GUESS times as slow."""
GUESS = 2.0


@dataclass(slots=True)
class ComputeSpeed:
    """seconds(start, end) = per_token * (end - start) + per_pair * (end² - start²) / 2."""

    _xx: float = 0.0
    _xy: float = 0.0
    _yy: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _longest: int = 0

    @property
    def measured(self) -> bool:
        return self._xx > 0

    def observe(self, start: int, end: int, seconds: float) -> None:
        """Tokens [start, end) were computed in so long, after the KV of those before."""
        if end - start < FEWEST_TOKENS or seconds <= 0:
            return
        self._longest = max(self._longest, end - start)
        x, y = (end - start) / seconds, _pairs(start, end) / seconds
        for name, value in (("_xx", x * x), ("_xy", x * y), ("_yy", y * y), ("_x", x), ("_y", y)):
            setattr(self, name, DECAY * getattr(self, name) + value)

    def seconds(self, start: int, end: int) -> float:
        """An estimate; 0 before anything was measured."""
        per_token, per_pair = self._coefficients()
        seconds = per_token * max(0, end - start) + per_pair * max(0.0, _pairs(start, end))
        return seconds * GUESS if end - start > FAR * self._longest else seconds

    def _coefficients(self) -> tuple[float, float]:
        if not self.measured:
            return 0.0, 0.0
        determinant = self._xx * self._yy - self._xy**2
        if determinant > 1e-6 * self._xx * self._yy:
            per_token = (self._x * self._yy - self._y * self._xy) / determinant
            per_pair = (self._y * self._xx - self._x * self._xy) / determinant
            if per_token >= 0 and per_pair >= 0:
                return per_token, per_pair
            if per_token < 0:
                return 0.0, self._y / self._yy
        return self._x / self._xx, 0.0


def _pairs(start: int, end: int) -> float:
    return (end * end - start * start) / 2
