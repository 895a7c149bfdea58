"""A bitstream comes back exactly, or not at all."""

import struct
import subprocess
import sys
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.kv.bitstream import HEADER_BYTES, CorruptChunk, decode, encode, read_header, verify

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
    """The stream with a header checksum that holds."""
    return stream[:60] + struct.pack("<I", crc32(stream[:60])) + stream[64:]


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
    for bit in range(8 * HEADER_BYTES):
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
        (4, "B", 2),  # version
        (5, "B", 0),  # codec
        (5, "B", 9),
        (6, "B", 0),  # dtype
        (7, "B", 1),  # flags
        (10, "H", 0),  # layers
        (10, "H", 65535),
        (12, "I", 0),  # tokens
        (12, "I", 2**32 - 1),
        (16, "H", 65535),  # kv_heads
        (18, "H", 65535),  # head_dim
        (20, "Q", 2**64 - 1),  # payload bytes
        (20, "Q", 0),
        (40, "B", 1),  # reserved
    ],
)
def test_a_sealed_header_that_lies_is_refused_before_anything_is_allocated(stream, offset, field, value):
    forged = bytearray(stream)
    struct.pack_into("<" + field, forged, offset, value)
    with pytest.raises(CorruptChunk):
        read_header(sealed(bytes(forged)))


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
