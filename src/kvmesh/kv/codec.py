"""Codecs: how the payload of a bitstream represents KV.

A codec turns an array [layers, 2, tokens, kv_heads, head_dim] into bytes and back. It knows no header and no checksum:
`bitstream` gives it payloads that arrived whole. To add one, write the two functions and list it in CODECS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

KvArray = npt.NDArray[Any]
"""`[layers, 2 (K, V), tokens, kv_heads, head_dim]`; bfloat16 travels as uint16 bit patterns."""
Shape = tuple[int, int, int, int, int]
Buffer = bytes | bytearray | memoryview

RAW = 1


@dataclass(frozen=True, slots=True)
class Codec:
    """`size` bounds the payload from the array's bytes, so that a wrong length is refused before decoding."""

    id: int
    name: str
    encode: Callable[[KvArray], Buffer]
    decode: Callable[[memoryview, Shape, np.dtype[Any]], KvArray]
    fits: Callable[[int, int], bool]
    """(payload bytes, array bytes) -> can this be?"""


def _raw_encode(data: KvArray) -> memoryview:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def _raw_decode(payload: memoryview, shape: Shape, dtype: np.dtype[Any]) -> KvArray:
    """A view, not a copy; read-only if the bitstream is `bytes`."""
    return np.frombuffer(payload, dtype).reshape(shape)


CODECS: Mapping[int, Codec] = MappingProxyType(
    {RAW: Codec(RAW, "raw", _raw_encode, _raw_decode, fits=lambda payload, array: payload == array)}
)
