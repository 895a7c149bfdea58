"""The head of a bitstream: what it holds, and where its quality layers end. `bitstream` says what follows.

A header of 64 bytes, little-endian, then a table with an entry for each of the n quality layers::

    0   4  magic "KVMB"       10  2  layers          20  1  n, 1 to 16
    4   1  version            12  4  tokens          21 39  zero
    5   1  codec id           16  2  kv_heads        60  4  CRC-32 of bytes 0..60
    6   1  dtype id           18  2  head_dim
    7   1  flags              64 12n entries: 8 end of the layer, from the start of the bitstream; 4 CRC-32 of the layer
    8   2  first_layer        …   4  CRC-32 of the entries

Flag 1: one plane instead of two, where values are read out of the keys (latent attention). The other flags are zero.
The first layer begins where the table ends, each other one where the one before it ends; none is empty. Every field is
bounded and checked before anything is allocated. Knows no payload beyond its length.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any
from zlib import crc32

import numpy as np

from kvmesh.kv.codec import CODECS, Buffer, CorruptChunk, Shape

VERSION = 2
HEADER_BYTES = 64
MAX_QUALITY_LAYERS = 16
MAX_BITSTREAM_BYTES = 256 << 20

_MAGIC = b"KVMB"
_ONE_PLANE = 1
_FIELDS = struct.Struct("<4s4B2HI2HB39s")
_ENTRY = struct.Struct("<QI")
_CRC = struct.Struct("<I")

WIRE_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")},
)
"""What an array of each dtype holds; their ids count from 1."""
_DTYPES = tuple(WIRE_DTYPES)

HEAD_BYTES = HEADER_BYTES + MAX_QUALITY_LAYERS * _ENTRY.size + _CRC.size
"""Header and the largest table: as many bytes, or the whole bitstream if it is shorter, suffice for `read_header`."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a bitstream says of itself; `dtype` is float32, float16 or bfloat16.

    `layer_ends`: where each quality layer that was encoded ends, in bytes from the start of the bitstream: whoever cuts
    there has a bitstream. `quality_layers`: how many of them lie whole in the bytes that were read.
    """

    codec: int
    dtype: str
    first_layer: int
    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    planes: int
    layer_ends: tuple[int, ...]
    layer_crcs: tuple[int, ...]
    quality_layers: int = 0

    @property
    def shape(self) -> Shape:
        return (self.layers, self.planes, self.tokens, self.kv_heads, self.head_dim)

    @property
    def wire_dtype(self) -> np.dtype[Any]:
        return WIRE_DTYPES[self.dtype]

    @property
    def array_bytes(self) -> int:
        return self.layers * self.planes * self.tokens * self.kv_heads * self.head_dim * self.wire_dtype.itemsize

    @property
    def payload_start(self) -> int:
        return head_bytes(len(self.layer_ends))

    @property
    def payload_bytes(self) -> int:
        """Of all quality layers."""
        return self.layer_ends[-1] - self.payload_start

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each quality layer."""
        return tuple(pairwise((self.payload_start, *self.layer_ends)))


def head_bytes(layers: int) -> int:
    """Length of header and table for so many quality layers."""
    return HEADER_BYTES + layers * _ENTRY.size + _CRC.size


def read_header(bitstream: Buffer) -> Header:
    """The header, checked, from the first HEAD_BYTES of a bitstream, or from as many as there are.

    Raises:
        CorruptChunk: damaged, cut, of a version not known here, or of an impossible shape or size.
    """
    head = bytes(memoryview(bitstream)[:HEAD_BYTES])
    fields = _sealed(head, 0, HEADER_BYTES - _CRC.size, "header")
    magic, version, codec, dtype, flags, first, layers, tokens, heads, dim, count, zeros = _FIELDS.unpack(fields)
    if magic != _MAGIC or version != VERSION or flags & ~_ONE_PLANE or any(zeros):
        raise CorruptChunk(f"not a bitstream of version {VERSION}")
    if codec not in CODECS or not 1 <= dtype <= len(_DTYPES):
        raise CorruptChunk(f"unknown codec {codec} or dtype {dtype}")
    if not 1 <= count <= MAX_QUALITY_LAYERS:
        raise CorruptChunk(f"{count} quality layers")
    table = _ENTRY.iter_unpack(_sealed(head, HEADER_BYTES, count * _ENTRY.size, "table of quality layers"))
    ends, crcs = zip(*table, strict=True)
    held = sum(end <= len(bitstream) for end in ends)
    planes = 1 if flags & _ONE_PLANE else 2
    header = Header(codec, _DTYPES[dtype - 1], first, layers, tokens, heads, dim, planes, ends, crcs, held)
    if problem := problem_of(header):
        raise CorruptChunk(problem)
    return header


def pack(header: Header) -> bytes:
    """Header and table."""
    kinds = (VERSION, header.codec, _DTYPES.index(header.dtype) + 1, _ONE_PLANE if header.planes == 1 else 0)
    sizes = (header.first_layer, header.layers, header.tokens, header.kv_heads, header.head_dim)
    fields = _FIELDS.pack(_MAGIC, *kinds, *sizes, len(header.layer_ends), b"")
    table = b"".join(_ENTRY.pack(*entry) for entry in zip(header.layer_ends, header.layer_crcs, strict=True))
    return b"".join((fields, _CRC.pack(crc32(fields)), table, _CRC.pack(crc32(table))))


def problem_of(header: Header) -> str:
    """Why there can be no such bitstream; empty if there can."""
    if not all(1 <= size < 1 << 16 for size in (header.layers, header.tokens, header.kv_heads, header.head_dim)):
        return f"impossible shape {header.shape}"
    if not 0 <= header.first_layer < 1 << 16:
        return f"impossible first layer {header.first_layer}"
    if max(header.array_bytes + HEADER_BYTES, header.layer_ends[-1]) > MAX_BITSTREAM_BYTES:
        return f"more than {MAX_BITSTREAM_BYTES} bytes"
    codec = CODECS[header.codec]
    if len(header.layer_ends) > codec.quality_layers or any(start >= end for start, end in header.spans):
        return f"quality layers of {codec.name} that end at {header.layer_ends}"
    if not codec.fits(header.payload_bytes, header.shape, header.wire_dtype.itemsize):
        return f"{header.payload_bytes} bytes of payload for {header.array_bytes} bytes of KV"
    return ""


def _sealed(head: bytes, start: int, size: int, name: str) -> bytes:
    """`size` bytes from `start`, if the checksum that follows them holds."""
    end = start + size
    if len(head) < end + _CRC.size:
        raise CorruptChunk(f"shorter than its {name}")
    if (crc32(head[start:end]),) != _CRC.unpack_from(head, end):
        raise CorruptChunk(f"the checksum of the {name} does not hold")
    return head[start:end]
