"""FP8 E4M3 with a scale per layer, plane and head: what inference engines call an fp8 cache.

    scales   float32 [layers, planes, kv_heads]
    values   uint8   [layers, planes, tokens, kv_heads, head_dim]: sign, 4 bits of exponent (bias 7), 3 of mantissa

Numbers as in "FP8 Formats for Deep Learning" (arXiv 2209.05433): the largest is 448, the pattern S.1111.111 is no
number. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvmesh.kv.codec import FP8, CorruptChunk, Format, KvArray, Shape
from kvmesh.kv.codecs.floats import Floats, from_float32, to_float32

LARGEST = 448.0
_SCALE = np.dtype("<f4")
_TINY = 2.0**-100
_LARGEST_SCALE = 3e38 / LARGEST
"""What it yields is a number in bfloat16 too."""


@dataclass(frozen=True, slots=True)
class Fp8:
    format: Format = FP8
    namespace: str = "fp8-e4m3/1"

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> tuple[bytes]:
        values = to_float32(data)
        peaks = np.abs(values).max(axis=(2, 4), keepdims=True)
        scales = np.maximum(peaks / LARGEST, _TINY).astype(_SCALE)
        halves = (values / scales).astype(np.float16).view(np.uint16)
        return (b"".join((scales.tobytes(), _nearest()[halves].tobytes())),)

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        layers, planes, _, heads, _ = shape
        count = layers * planes * heads
        scales = np.frombuffer(parts[0], _SCALE, count).reshape(layers, planes, 1, heads, 1)
        codes = np.frombuffer(parts[0], np.uint8, offset=count * _SCALE.itemsize).reshape(shape)
        if not (np.abs(scales) <= _LARGEST_SCALE).all() or (codes & 0x7F == 0x7F).any():
            raise CorruptChunk("a scale or value is not a number")
        return from_float32(numbers()[codes] * scales, dtype)


@cache
def numbers() -> Floats:
    """float32 of each of the 256 codes."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


@cache
def _nearest() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The code nearest to each float16 pattern, ties to even; a pattern beyond the range goes to the largest."""
    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    positive = numbers()[:127]
    upper = np.clip(np.searchsorted(positive, np.nan_to_num(halves, nan=LARGEST, posinf=LARGEST)), 1, 126)
    middle = (positive[upper - 1] + positive[upper]) / 2
    down = (halves < middle) | ((halves == middle) & (upper % 2 == 1))
    codes = np.where(down, upper - 1, upper).astype(np.uint8)
    return np.concatenate([codes, codes | 128])
