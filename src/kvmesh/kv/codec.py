"""Codecs: how the payload of a bitstream represents KV.

A codec turns an array [layers, planes, tokens, kv_heads, head_dim] into bytes and back. It knows no header and no
checksum: `bitstream` gives it payloads that arrived whole. CODECS lists what may be stored and forwarded, by anyone;
who encodes or decodes holds a Codec, which may need a model's profile. The lossy ones are in `codecs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

KvArray = npt.NDArray[Any]
"""`[layers, planes (K, V), tokens, kv_heads, head_dim]`; bfloat16 travels as uint16 bit patterns."""
Shape = tuple[int, int, int, int, int]
Buffer = bytes | bytearray | memoryview

EXACT = "exact"
"""The namespace of KV that comes back bit by bit."""


class CorruptChunk(ValueError):
    """Not a whole, undamaged bitstream; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Format:
    """What can be known of a payload without decoding it."""

    id: int
    name: str
    fits: Callable[[int, Shape, int], bool]
    """(payload bytes, shape, bytes of an element) -> can this be? A wrong length is refused before decoding."""
    quality_layers: int = 1
    """At most; more than one if the codec is progressive."""


class Codec(Protocol):
    """One way of encoding, ready for use; stateless, callable from any thread, too slow for an event loop."""

    @property
    def format(self) -> Format: ...

    @property
    def namespace(self) -> str:
        """The `codec` field of the fingerprint: equal only if what is decoded is equally good."""

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> Sequence[Buffer]:
        """The payload, one part for each quality layer, coarse to fine; `start` is the first token's position.

        Raises ValueError for what it cannot represent.
        """

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        """An array of `shape` and `dtype` (uint16: bfloat16) from the first part or more; raises CorruptChunk."""


def _any_payload(size: int, shape: Shape, itemsize: int) -> bool:
    """Entropy coded: little more than the array at most, whatever it held."""
    elements = int(np.prod(shape, dtype=np.int64))
    return 0 < size <= max(itemsize, 3) * elements + (elements >> 3) + 4096


def _int8_size(size: int, shape: Shape, itemsize: int) -> bool:
    layers, planes, tokens, heads, dim = shape
    return size == layers * planes * heads * dim * (tokens + 2 * -(-tokens // INT8_GROUP))


def _fp8_size(size: int, shape: Shape, itemsize: int) -> bool:
    layers, planes, tokens, heads, dim = shape
    return size == layers * planes * heads * dim * tokens + 4 * layers * planes * heads


INT8_GROUP = 128
"""Tokens that share the scale of a channel."""

RAW = Format(1, "raw", lambda size, shape, itemsize: size == int(np.prod(shape, dtype=np.int64)) * itemsize)
INT8 = Format(2, "int8", _int8_size)
FP8 = Format(3, "fp8", _fp8_size)
CACHEGEN = Format(4, "cachegen", _any_payload)
TRANSFORM = Format(5, "transform", _any_payload, quality_layers=16)
LOSSLESS = Format(6, "lossless", _any_payload)

CODECS: Mapping[int, Format] = MappingProxyType(
    {format.id: format for format in (RAW, INT8, FP8, CACHEGEN, TRANSFORM, LOSSLESS)}
)


@dataclass(frozen=True, slots=True)
class Raw:
    """The array as it lies in memory, little-endian."""

    format: Format = RAW
    namespace: str = EXACT

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> tuple[memoryview]:
        return (np.ascontiguousarray(data).reshape(-1).view(np.uint8).data,)

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        """A view, not a copy; read-only if the bitstream is `bytes`."""
        return np.frombuffer(parts[0], dtype).reshape(shape)
