"""The inner loops of `quantiser`. They trust their arguments. Importing this imports numba."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codecs.compiled import compiled

Array = npt.NDArray[Any]


@compiled
def quantise(values: Array, means: Array, scales: Array, lows: Array, highs: Array, zero: int, symbols: Array) -> int:
    """Fills `symbols` `[blocks, rows, columns]`; returns how many are the escape, 0."""
    blocks, rows, columns = values.shape
    escapes = 0
    for b in range(blocks):
        scale, mean, low, high = scales[b], means[b], lows[b], highs[b]
        for r in range(rows):
            row, out = values[b, r], symbols[b, r]
            for c in range(columns):
                level = np.rint((row[c] - mean[c]) * scale)
                inside = level >= low[c] and level <= high[c]
                out[c] = np.uint8(np.int32(level) + zero) if inside else np.uint8(0)
                escapes += 0 if inside else 1
    return escapes


@compiled
def dequantise(symbols: Array, means: Array, steps: Array, zero: int, values: Array) -> None:
    """Fills `values` `[blocks, rows, columns]`."""
    blocks, rows, columns = values.shape
    for b in range(blocks):
        step, mean = steps[b], means[b]
        for r in range(rows):
            row, out = symbols[b, r], values[b, r]
            for c in range(columns):
                out[c] = np.float32(np.int32(row[c]) - np.int32(zero)) * step + mean[c]
