"""Eight bits with a scale per channel and group of tokens: the baseline that every peer has.

    scales   float16 [layers, planes, groups, kv_heads * head_dim]
    values   int8    [layers, planes, tokens, kv_heads * head_dim]

Per channel, because a few channels of K are large in every token (KIVI, arXiv 2402.02750). Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvmesh.kv.codec import INT8, INT8_GROUP, CorruptChunk, Format, KvArray, Shape
from kvmesh.kv.codecs.floats import Floats, from_float32, to_float32

_SCALE = np.dtype("<f2")
_LARGEST = 65504.0


@dataclass(frozen=True, slots=True)
class Int8:
    format: Format = INT8
    namespace: str = "int8/1"

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> tuple[bytes]:
        layers, planes, tokens, heads, dim = data.shape
        values = to_float32(data).reshape(layers, planes, tokens, heads * dim)
        starts = np.arange(0, tokens, INT8_GROUP)
        peaks = np.maximum.reduceat(np.abs(values), starts, axis=2)
        # Rounded up, so that no value leaves the range.
        scales = np.clip(peaks / 127 * (1 + 2**-10), 2**-24, _LARGEST).astype(_SCALE)
        levels = np.clip(np.rint(values / _spread(scales, tokens)), -127, 127).astype(np.int8)
        return (b"".join((scales.tobytes(), levels.tobytes())),)

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        layers, planes, tokens, heads, dim = shape
        groups, channels = -(-tokens // INT8_GROUP), heads * dim
        count = layers * planes * groups * channels
        scales = np.frombuffer(parts[0], _SCALE, count).reshape(layers, planes, groups, channels)
        if not np.isfinite(scales).all():
            raise CorruptChunk("a scale is not finite")
        levels = np.frombuffer(parts[0], np.int8, offset=count * _SCALE.itemsize)
        values = levels.reshape(layers, planes, tokens, channels) * _spread(scales, tokens)
        return from_float32(values, dtype).reshape(shape)


def _spread(scales: KvArray, tokens: int) -> Floats:
    """One scale for each token."""
    return np.repeat(scales.astype(np.float32), INT8_GROUP, axis=2)[:, :, :tokens]
