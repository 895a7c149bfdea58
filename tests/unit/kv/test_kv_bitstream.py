"""A bitstream comes back exactly, or not at all."""

import struct
import subprocess
import sys
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.kv.bitstream import HEAD_BYTES, CorruptChunk, cut, decode, encode, read_header, verify
from kvmesh.kv.codec import TRANSFORM, Format
from kvmesh.kv.header import head_bytes

WIRE = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


@st.composite
def chunks(draw):
    dtype = draw(st.sampled_from(sorted(WIRE)))
    layers, tokens, heads, dim = (draw(st.integers(1, n)) for n in (3, 5, 3, 8))
    count = layers * 2 * tokens * heads * dim
    raw = draw(
        st.binary(min_size=count * np.dtype(WIRE[dtype]).itemsize, max_size=count * np.dtype(WIRE[dtype]).itemsize)
    )
    return np.frombuffer(raw, WIRE[dtype]).reshape(layers, 2, tokens, heads, dim), dtype, draw(st.integers(0, 80))


def sealed(stream: bytes) -> bytes:
    """The stream with checksums of header and table that hold."""
    table = stream[64 : head_bytes(stream[20]) - 4]
    seals = [struct.pack("<I", crc32(part)) for part in (stream[:60], table)]
    return stream[:60] + seals[0] + table + seals[1] + stream[64 + len(table) + 4 :]


@dataclass(frozen=True)
class Nested:
    """A progressive codec to test with: each quality layer adds one byte of every value, the highest first."""

    format: Format = TRANSFORM
    namespace: str = "nested"

    def encode(self, data, first_layer, start=0):
        return [np.ascontiguousarray(data.astype(">f4").view("u1")[..., byte::4]).tobytes() for byte in range(4)]

    def decode(self, parts, shape, dtype, first_layer):
        values = np.zeros((*shape, 4), "u1")
        for byte, part in enumerate(parts):
            values[..., byte] = np.frombuffer(part, "u1").reshape(shape)
        return values.view(">f4")[..., 0].astype("<f4")


@pytest.fixture
def stream() -> bytes:
    return encode(np.arange(96, dtype="<f4").reshape(2, 2, 3, 2, 4), "float32", 4)


@given(chunks())
def test_round_trip(chunk):
    data, dtype, first_layer = chunk
    back = decode(encode(data, dtype, first_layer))
    assert back.data.tobytes() == data.tobytes()
    assert (back.data.shape, back.data.dtype) == (data.shape, data.dtype)
    assert (back.header.dtype, back.header.first_layer, back.header.codec) == (dtype, first_layer, 1)
    assert back.header.shape == data.shape


def test_strided_data_is_encoded_as_it_reads():
    data = np.arange(96, dtype="<f4").reshape(2, 2, 3, 2, 4).transpose(0, 1, 3, 2, 4)
    assert (decode(encode(data, "float32", 0)).data == data).all()


@given(chunks(), st.data())
def test_any_flipped_byte_is_noticed(chunk, data):
    stream = bytearray(encode(*chunk))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptChunk):
        decode(stream)


def test_every_single_bit_of_a_header_counts(stream):
    for bit in range(8 * head_bytes(1)):
        flipped = bytearray(stream)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptChunk):
            verify(flipped)


@given(chunks(), st.data())
def test_any_other_length_is_noticed(chunk, data):
    stream = encode(*chunk)
    with pytest.raises(CorruptChunk):
        decode(stream[: data.draw(st.integers(0, len(stream) - 1))])
    with pytest.raises(CorruptChunk):
        decode(stream + data.draw(st.binary(min_size=1)))


@given(st.binary(max_size=300))
def test_random_bytes_are_not_data(noise):
    with pytest.raises(CorruptChunk):
        decode(noise)


@pytest.mark.parametrize(
    ("offset", "field", "value"),
    [
        (0, "4s", b"KVMC"),
        (4, "B", 1),  # version
        (5, "B", 0),  # codec
        (5, "B", 99),
        (6, "B", 0),  # dtype
        (7, "B", 1),  # flags
        (10, "H", 0),  # layers
        (10, "H", 65535),
        (12, "I", 0),  # tokens
        (12, "I", 2**32 - 1),
        (16, "H", 65535),  # kv_heads
        (18, "H", 65535),  # head_dim
        (20, "B", 0),  # quality layers
        (20, "B", 2),
        (20, "B", 17),
        (20, "B", 255),
        (21, "B", 1),  # reserved
        (59, "B", 1),
        (64, "Q", 2**64 - 1),  # end of the layer
        (64, "Q", 0),
        (64, "Q", 80),
        (64, "Q", 465),
    ],
)
def test_a_sealed_header_that_lies_is_refused_before_anything_is_allocated(stream, offset, field, value):
    forged = bytearray(stream)
    struct.pack_into("<" + field, forged, offset, value)
    with pytest.raises(CorruptChunk):
        read_header(sealed(bytes(forged)))


@given(chunks(), st.integers(1, 6))
def test_a_prefix_of_whole_quality_layers_is_a_coarser_chunk(chunk, count):
    data = np.abs(np.nan_to_num(chunk[0].astype("<f4"), posinf=1, neginf=1))
    stream = encode(data, "float32", 0, Nested())
    prefix = cut(stream, count)
    header = verify(prefix)
    assert header.layer_ends == verify(stream).layer_ends
    assert (header.quality_layers, len(prefix)) == (min(count, 4), header.layer_ends[min(count, 4) - 1])
    kept = data.view("<u4") >> (32 - 8 * header.quality_layers) << (32 - 8 * header.quality_layers)
    assert (decode(prefix, Nested()).data == kept.view("<f4")).all()


@given(st.data())
def test_a_progressive_bitstream_cut_or_changed_anywhere_else_is_noticed(data):
    stream = encode(np.ones((1, 2, 3, 1, 5), "<f4"), "float32", 0, Nested())
    ends = read_header(stream).layer_ends
    length = data.draw(st.integers(0, len(stream)).filter(lambda length: length not in ends))
    with pytest.raises(CorruptChunk):
        verify(stream[:length])
    changed = bytearray(cut(stream, data.draw(st.integers(1, 4))))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptChunk):
        verify(changed)


def test_the_head_alone_tells_where_the_quality_layers_end():
    data = np.ones((2, 2, 64, 2, 4), "<f4")
    stream = encode(data, "float32", 0, Nested())
    header = read_header(stream[:HEAD_BYTES])
    assert header.quality_layers == 0
    start = head_bytes(4)
    assert header.spans == tuple((start + data.size * i, start + data.size * (i + 1)) for i in range(4))
    assert header.layer_ends[-1] == len(stream)
    assert [read_header(stream[:end]).quality_layers for end in header.layer_ends] == [1, 2, 3, 4]
    assert [read_header(stream[: end - 1]).quality_layers for end in header.layer_ends] == [0, 1, 2, 3]


def test_only_progressive_codecs_have_several_quality_layers(stream):
    layered = bytearray(encode(np.ones((2, 2, 3, 2, 4), "<f4"), "float32", 0, Nested()))
    layered[5] = 1
    with pytest.raises(CorruptChunk, match="quality layers of raw"):
        read_header(sealed(bytes(layered)))


def test_raw_data_is_a_view(stream):
    assert np.shares_memory(decode(stream).data, np.frombuffer(stream, "u1"))


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (np.zeros((2, 2, 3, 2), "<f4"), "float32"),
        (np.zeros((2, 3, 3, 2, 4), "<f4"), "float32"),
        (np.zeros((2, 2, 0, 2, 4), "<f4"), "float32"),
        (np.zeros((2, 2, 3, 2, 4), "<f4"), "float16"),
        (np.zeros((2, 2, 3, 2, 4), "<f8"), "float64"),
    ],
)
def test_what_is_not_kv_is_not_encoded(data, dtype):
    with pytest.raises(ValueError, match=r"not KV|impossible"):
        encode(data, dtype, 0)


def test_the_allocator_takes_the_settings_for_frames():
    code = "import platform; from kvmesh.kv.heap import keep_freed_frames as keep; "
    code += "assert keep() == (platform.libc_ver()[0] == 'glibc')"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
