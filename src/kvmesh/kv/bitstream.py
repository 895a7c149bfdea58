"""A chunk of KV as one checked, self-describing string of bytes.

::

    0   64       header                      both as `header` says, byte by byte
    64  12n + 4  table of n quality layers
    …   …        the layers, one after the other: the payload of a codec

A codec that is progressive puts a coarse rendition into the first quality layer (JPEG 2000's term) and refines it in
the others, so that a bitstream which ends where one of its layers ends is a whole, coarser one: a prefix can be stored,
sent, verified and decoded. Other codecs have one layer. Whatever is not exactly such a string is CorruptChunk. Knows no
store and no key: that the content is the one a key promises rests on whoever put it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from zlib import crc32

from kvmesh.kv.codec import CODECS, Buffer, Codec, CorruptChunk, KvArray, Raw
from kvmesh.kv.header import (
    HEAD_BYTES,
    HEADER_BYTES,
    MAX_BITSTREAM_BYTES,
    MAX_QUALITY_LAYERS,
    VERSION,
    WIRE_DTYPES,
    Header,
    head_bytes,
    pack,
    problem_of,
    read_header,
)

__all__ = [
    "HEADER_BYTES",
    "HEAD_BYTES",
    "MAX_BITSTREAM_BYTES",
    "MAX_QUALITY_LAYERS",
    "VERSION",
    "Chunk",
    "CorruptChunk",
    "Header",
    "cut",
    "decode",
    "encode",
    "read_header",
    "verify",
]


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
    if data.ndim != 5 or data.shape[1] not in (1, 2) or dtype not in WIRE_DTYPES or data.dtype != WIRE_DTYPES[dtype]:
        raise ValueError(f"not KV of {dtype}: {data.dtype} {data.shape}")
    codec = codec or Raw()
    parts = codec.encode(data, first_layer, start)
    layers, planes, tokens, heads, dim = data.shape
    ends = tuple(accumulate(map(len, parts), initial=head_bytes(len(parts))))[1:]
    crcs = tuple(map(crc32, parts))
    header = Header(codec.format.id, dtype, first_layer, layers, tokens, heads, dim, planes, ends, crcs)
    if problem := problem_of(header):
        raise ValueError(problem)
    return b"".join((pack(header), *parts))


def decode(bitstream: Buffer, codec: Codec | None = None) -> Chunk:
    """The chunk of a bitstream that `codec` made (raw by default), or of a prefix of whole quality layers.

    Raw data is a view of the bitstream.

    Raises:
        CorruptChunk: damaged, cut elsewhere, extended, of a version not known here, or of another codec.
    """
    codec = codec or Raw()
    header = verify(bitstream)
    if header.codec != codec.format.id:
        raise CorruptChunk(f"encoded by {CODECS[header.codec].name} where {codec.format.name} is due")
    return Chunk(header, codec.decode(_parts(bitstream, header), header.shape, header.wire_dtype, header.first_layer))


def verify(bitstream: Buffer) -> Header:
    """The header, once length and all checksums hold; raises CorruptChunk.

    A bitstream that ends with one of its quality layers holds; `quality_layers` tells how many there are.
    """
    header = read_header(bitstream)
    if len(bitstream) not in header.layer_ends:
        raise CorruptChunk(f"{len(bitstream)} bytes, where quality layers end at {header.layer_ends}")
    if tuple(map(crc32, _parts(bitstream, header))) != header.layer_crcs[: header.quality_layers]:
        raise CorruptChunk("the payload's checksum does not hold")
    return header


def cut(bitstream: Buffer, quality_layers: int) -> memoryview:
    """The prefix of so many quality layers, or all of the bitstream if it has no more; raises CorruptChunk."""
    ends = read_header(bitstream).layer_ends
    return memoryview(bitstream)[: ends[min(quality_layers, len(ends)) - 1]]


def _parts(bitstream: Buffer, header: Header) -> list[memoryview]:
    view = memoryview(bitstream)
    return [view[start:end] for start, end in header.spans[: header.quality_layers]]
