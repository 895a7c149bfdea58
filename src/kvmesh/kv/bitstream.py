"""A chunk of KV as one checked, self-describing string of bytes.

A fixed header of 64 bytes, little-endian, then the payload of a codec::

    0   4  magic "KVMB"       12  4  tokens           32 28  zero
    4   1  version            16  2  kv_heads         60  4  CRC-32 of bytes 0..60
    5   1  codec id           18  2  head_dim
    6   1  dtype id           20  8  payload bytes
    7   1  flags              28  4  CRC-32 of the payload
    8   2  first_layer
    10  2  layers

Flag 1: one plane instead of two, where values are read out of the keys (latent attention). The other flags are zero.
Every field is bounded and checked before anything is allocated; whatever is not exactly such a string is CorruptChunk.
Knows no store and no key: that the content is the one a key promises rests on whoever put it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any
from zlib import crc32

import numpy as np

from kvmesh.kv.codec import CODECS, Buffer, Codec, CorruptChunk, KvArray, Raw, Shape

__all__ = ["Chunk", "CorruptChunk", "Header", "decode", "encode", "read_header", "verify"]

VERSION = 1
HEADER_BYTES = 64
MAX_BITSTREAM_BYTES = 256 << 20

_MAGIC = b"KVMB"
_ONE_PLANE = 1
_FIELDS = struct.Struct("<4s4B2HI2HQI28s")
_CRC = struct.Struct("<I")
_DTYPES: Mapping[str, int] = MappingProxyType({"float32": 1, "float16": 2, "bfloat16": 3})
_WIRE: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {1: np.dtype("<f4"), 2: np.dtype("<f2"), 3: np.dtype("<u2")},
)


@dataclass(frozen=True, slots=True)
class Header:
    """What a bitstream says of itself; `dtype` is float32, float16 or bfloat16."""

    codec: int
    dtype: str
    first_layer: int
    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    payload_bytes: int
    payload_crc: int
    planes: int = 2

    @property
    def shape(self) -> Shape:
        return (self.layers, self.planes, self.tokens, self.kv_heads, self.head_dim)

    @property
    def wire_dtype(self) -> np.dtype[Any]:
        return _WIRE[_DTYPES[self.dtype]]

    @property
    def array_bytes(self) -> int:
        return self.layers * self.planes * self.tokens * self.kv_heads * self.head_dim * self.wire_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Chunk:
    header: Header
    data: KvArray


def encode(data: KvArray, dtype: str, first_layer: int, codec: Codec | None = None, start: int = 0) -> bytes:
    """The bitstream of `data`, [layers, planes, tokens, kv_heads, head_dim] of `dtype` (bfloat16: uint16 bit patterns).

    `codec`: raw by default. `start`: the first token's position; the first of a text deserve more bits.

    Raises:
        ValueError: a shape, dtype or size that a bitstream cannot carry, or values that the codec cannot.
    """
    if data.ndim != 5 or data.shape[1] not in (1, 2) or dtype not in _DTYPES or data.dtype != _WIRE[_DTYPES[dtype]]:
        raise ValueError(f"not KV of {dtype}: {data.dtype} {data.shape}")
    codec = codec or Raw()
    payload = codec.encode(data, first_layer, start)
    layers, planes, tokens, kv_heads, head_dim = data.shape
    shape = (layers, tokens, kv_heads, head_dim)
    header = Header(codec.format.id, dtype, first_layer, *shape, len(payload), crc32(payload), planes)
    if problem := _problem(header):
        raise ValueError(problem)
    return b"".join((_pack(header), payload))


def decode(bitstream: Buffer, codec: Codec | None = None) -> Chunk:
    """The chunk of a bitstream that `codec` made (raw by default); raw data is a view of it.

    Raises:
        CorruptChunk: damaged, cut, extended, of a version not known here, or of another codec.
    """
    codec = codec or Raw()
    header = verify(bitstream)
    if header.codec != codec.format.id:
        raise CorruptChunk(f"encoded by {CODECS[header.codec].name} where {codec.format.name} is due")
    payload = memoryview(bitstream)[HEADER_BYTES:]
    return Chunk(header, codec.decode(payload, header.shape, header.wire_dtype, header.first_layer))


def verify(bitstream: Buffer) -> Header:
    """The header, once length and both checksums hold; raises CorruptChunk."""
    header = read_header(bitstream)
    payload = memoryview(bitstream)[HEADER_BYTES:]
    if len(payload) != header.payload_bytes:
        raise CorruptChunk(f"{len(payload)} bytes of payload instead of {header.payload_bytes}")
    if crc32(payload) != header.payload_crc:
        raise CorruptChunk("the payload's checksum does not hold")
    return header


def read_header(bitstream: Buffer) -> Header:
    """The header alone, checked, from the first HEADER_BYTES of a bitstream; raises CorruptChunk."""
    head = bytes(memoryview(bitstream)[:HEADER_BYTES])
    if len(head) < HEADER_BYTES:
        raise CorruptChunk("shorter than a header")
    fields, (crc,) = head[: _FIELDS.size], _CRC.unpack(head[_FIELDS.size :])
    if crc32(fields) != crc:
        raise CorruptChunk("the header's checksum does not hold")
    magic, version, codec, dtype, flags, *sizes, zeros = _FIELDS.unpack(fields)
    if magic != _MAGIC or version != VERSION or flags & ~_ONE_PLANE or any(zeros):
        raise CorruptChunk(f"not a bitstream of version {VERSION}")
    if codec not in CODECS or dtype not in _WIRE:
        raise CorruptChunk(f"unknown codec {codec} or dtype {dtype}")
    name = next(name for name, number in _DTYPES.items() if number == dtype)
    header = replace(Header(codec, name, *sizes), planes=1 if flags & _ONE_PLANE else 2)
    if problem := _problem(header):
        raise CorruptChunk(problem)
    return header


def _pack(header: Header) -> bytes:
    sizes = (header.first_layer, header.layers, header.tokens, header.kv_heads, header.head_dim)
    kinds = (VERSION, header.codec, _DTYPES[header.dtype], _ONE_PLANE if header.planes == 1 else 0)
    fields = _FIELDS.pack(_MAGIC, *kinds, *sizes, header.payload_bytes, header.payload_crc, b"")
    return fields + _CRC.pack(crc32(fields))


def _problem(header: Header) -> str | None:
    if not all(1 <= size < 1 << 16 for size in (header.layers, header.tokens, header.kv_heads, header.head_dim)):
        return f"impossible shape {header.shape}"
    if not 0 <= header.first_layer < 1 << 16:
        return f"impossible first layer {header.first_layer}"
    if max(header.array_bytes, header.payload_bytes) > MAX_BITSTREAM_BYTES - HEADER_BYTES:
        return f"more than {MAX_BITSTREAM_BYTES} bytes"
    if not CODECS[header.codec].fits(header.payload_bytes, header.shape, header.wire_dtype.itemsize):
        return f"{header.payload_bytes} bytes of payload for {header.array_bytes} bytes of KV"
    return None
