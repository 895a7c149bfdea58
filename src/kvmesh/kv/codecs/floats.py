"""KV elements as float32 and back. Knows no codec."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def to_float32(data: npt.NDArray[Any]) -> Floats:
    """`data` of float32, float16 or uint16 (bfloat16 bit patterns), contiguous.

    Raises:
        ValueError: a value is not finite: a lossy codec cannot represent it.
    """
    if data.dtype == np.dtype("<u2"):
        values = (data.astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ValueError("KV holds values that are not finite")
    return np.ascontiguousarray(values)


def from_float32(values: Floats, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The inverse, rounded to nearest; what float16 cannot hold becomes its largest value."""
    if dtype == np.dtype("<u2"):
        bits = values.view(np.uint32)
        rounded: npt.NDArray[Any] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return rounded
    if dtype == np.dtype("<f2"):
        return np.clip(values, -65504, 65504).astype(dtype)
    return values.astype(dtype, copy=False)
