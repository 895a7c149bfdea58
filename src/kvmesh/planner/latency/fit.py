"""Fits latency models to measured points: least squares of the relative error, no coefficient below zero.

A fifth of the points is held out, and the model judged by them. Knows features and seconds, not where they come from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from kvmesh.errors import InvalidArgument

Floats = NDArray[np.float64]

HELD_OUT = 0.2


@dataclass(frozen=True, slots=True)
class Fit:
    """`coefficients` of the features; `mape`: mean absolute error, relative, on the `held_out` points."""

    coefficients: tuple[float, ...]
    mape: float
    points: int
    held_out: int

    def predict(self, features: Sequence[float]) -> float:
        return sum(c * f for c, f in zip(self.coefficients, features, strict=True))


def fit(features: Sequence[Sequence[float]], seconds: Sequence[float], seed: int = 0) -> Fit:
    """A linear model of all points, with the error that one fitted to four fifths has on the rest.

    Raises:
        InvalidArgument: too few points to hold any out, or a time that is not positive.
    """
    if not features or len(seconds) < len(features[0]) + 2:
        raise InvalidArgument(f"{len(seconds)} points are too few to fit a model and to judge it")
    if min(seconds) <= 0:
        raise InvalidArgument("a measured time is not positive")
    order = list(range(len(seconds)))
    random.Random(seed).shuffle(order)
    cut = max(1, round(HELD_OUT * len(order)))
    x, y = np.asarray(features, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    tested, trained = order[:cut], order[cut:]
    error = mape(x[tested] @ solve(x[trained], y[trained]), y[tested])
    return Fit(tuple(map(float, solve(x, y))), error, len(order), cut)


def solve(features: Floats, seconds: Floats) -> Floats:
    """Coefficients that minimise the sum of squared relative errors."""
    scale = np.maximum(np.abs(features).max(axis=0), 1e-30)
    coefficients, _ = nnls(features / scale / seconds[:, None], np.ones(len(seconds)))
    return np.asarray(coefficients / scale)


def mape(predicted: Sequence[float] | Floats, seconds: Sequence[float] | Floats) -> float:
    """Mean absolute relative error."""
    guess, truth = np.asarray(predicted), np.asarray(seconds)
    return float(np.mean(np.abs(guess - truth) / truth))
