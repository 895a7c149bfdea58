"""Forges bitstreams and decodes them: `python -m tests.unit.kv.codec_fuzz 100000` for each decoder.

A forged stream has checksums that hold. It is refused with CorruptChunk, or decodes, to finite values if the codec is
lossy, within `MEMORY_FACTOR` times the bytes of the KV that it declares.
"""

import random
import struct
import sys
import time
import tracemalloc
from contextlib import suppress
from itertools import pairwise
from zlib import crc32

import numpy as np

from kvmesh.kv import bitstream
from kvmesh.kv.bitstream import HEADER_BYTES, MAX_QUALITY_LAYERS, CorruptChunk
from kvmesh.kv.codec import EXACT, Codec
from kvmesh.kv.codecs.cachegen import CacheGen
from kvmesh.kv.codecs.floats import to_float32
from kvmesh.kv.codecs.fp8 import Fp8
from kvmesh.kv.codecs.int8 import Int8
from kvmesh.kv.codecs.lossless import Lossless
from kvmesh.kv.codecs.transform import Transform
from kvmesh.kv.header import head_bytes
from tests.unit.kv.codec_profiles import RECIPES, kv, profile, transforming

COUNT = 20
"""Where a header has the number of its quality layers."""
MEMORY_FACTOR, MEMORY_SLACK = 8, 1 << 20


def codecs() -> list[Codec]:
    grouped = [CacheGen(profile(), level) for level in range(1, len(RECIPES) + 1)]
    return [Int8(), Fp8(), Lossless(), *grouped, Transform(transforming())]


def sealed(stream: bytearray) -> bytes:
    """With a last end and checksums that hold, as an attacker would make them; the other ends as they are."""
    forged, count = bytearray(stream), stream[COUNT]
    if 1 <= count <= MAX_QUALITY_LAYERS and len(forged) >= head_bytes(count):
        table = slice(HEADER_BYTES, head_bytes(count) - 4)
        ends = [end for end, _ in struct.iter_unpack("<QI", forged[table])]
        spans = pairwise((head_bytes(count), *ends[:-1], len(forged)))
        entries = [struct.pack("<QI", end, crc32(forged[start:end])) for start, end in spans]
        forged[table] = b"".join(entries)
        struct.pack_into("<I", forged, table.stop, crc32(forged[table]))
    struct.pack_into("<I", forged, 60, crc32(forged[:60]))
    return bytes(forged)


def forge(stream: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, most of them near the front where structure is; sometimes cut, extended or doubled."""
    forged, head = bytearray(stream), head_bytes(stream[COUNT])
    for _ in range(dice.randint(1, 5)):
        payload = len(forged) - head
        places = [(5, 16), (head, min(60, payload)), (head, payload), (HEADER_BYTES, head - HEADER_BYTES)]
        start, length = dice.choice(places if stream[COUNT] > 1 else places[:3])
        forged[start + dice.randrange(length)] = dice.choice([0, 1, 0xFF, dice.randrange(256)])
    match dice.randrange(6):
        case 0:
            del forged[dice.randint(head, len(forged)) :]
        case 1:
            forged += dice.randbytes(dice.randrange(64))
        case 2:
            forged += forged[head:]
        case 3 if stream[COUNT] > 1:
            return bytes(bitstream.cut(sealed(bytearray(stream)), dice.randint(1, stream[COUNT])))
    return sealed(forged)


def fuzz(codec: Codec, count: int, seed: int = 0) -> int:
    """How many of `count` forged streams were taken for chunks."""
    dice, taken = random.Random(seed), 0
    streams = [bitstream.encode(kv(tokens, seed=tokens), "float32", 0, codec) for tokens in (1, 11, 16)]
    for _ in range(count):
        try:
            chunk = bitstream.decode(forge(dice.choice(streams), dice), codec)
        except CorruptChunk:
            continue
        taken += 1
        assert chunk.data.shape == chunk.header.shape
        assert codec.namespace == EXACT or np.isfinite(to_float32(chunk.data)).all()
    return taken


def peak(codec: Codec, count: int) -> float:
    """The most memory that decoding a forged stream took, as a multiple of what is allowed."""
    dice, worst = random.Random(7), 0.0
    stream = bitstream.encode(kv(16), "float32", 0, codec)
    bitstream.decode(stream, codec)
    for _ in range(count):
        forged = forge(stream, dice)
        try:
            declared = bitstream.read_header(forged).array_bytes
        except CorruptChunk:
            declared = 0
        tracemalloc.start()
        with suppress(CorruptChunk):
            bitstream.decode(forged, codec)
        worst = max(worst, tracemalloc.get_traced_memory()[1] / (MEMORY_FACTOR * declared + MEMORY_SLACK))
        tracemalloc.stop()
    return worst


if __name__ == "__main__":
    for codec in codecs():
        begun, count = time.monotonic(), int(sys.argv[1])
        taken = fuzz(codec, count)
        print(
            f"{codec.namespace[:12]:12}  {count} streams, {taken} decoded, {time.monotonic() - begun:.0f} s", flush=True
        )
