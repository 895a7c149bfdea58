"""The lossless codec: every bit pattern comes back, real ones in less room, and no other bytes are taken for them."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.kv import bitstream
from kvmesh.kv.bitstream import CorruptChunk
from kvmesh.kv.codec import EXACT
from kvmesh.kv.codecs.lossless import Lossless
from tests.unit.kv.codec_profiles import kv

WIRE = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


@given(st.sampled_from(sorted(WIRE)), st.binary(min_size=48, max_size=48))
def test_any_bits_come_back(dtype, raw):
    data = np.frombuffer(raw, WIRE[dtype]).reshape(1, 2, -1, 1, 3)
    back = bitstream.decode(bitstream.encode(data, dtype, 0, Lossless()), Lossless()).data
    assert (back.tobytes(), back.shape, back.dtype) == (raw, data.shape, data.dtype)


@pytest.mark.parametrize(("dtype", "ratio"), [("bfloat16", 1.3), ("float32", 1.12)])
def test_it_is_smaller(dtype, ratio):
    data = kv(256)
    data = (data.view("<u4") >> 16).astype("<u2") if dtype == "bfloat16" else data
    assert len(bitstream.encode(data, dtype, 0, Lossless())) < data.nbytes / ratio


def test_it_is_exact():
    assert Lossless().namespace == EXACT


@given(st.data())
def test_mutated_payloads_are_refused_or_of_the_right_shape(data):
    chunk = kv(5)
    payload = bytearray(Lossless().encode(chunk, 0)[0])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(payload) - 1) | st.integers(3 * chunk.size, len(payload) - 1))
        payload[place] = data.draw(st.integers(0, 255))
    del payload[data.draw(st.integers(0, len(payload))) if data.draw(st.booleans()) else len(payload) :]
    with suppress(CorruptChunk):
        assert Lossless().decode([memoryview(payload)], chunk.shape, chunk.dtype, 0).shape == chunk.shape


def test_a_frame_that_would_grow_is_refused_unopened():
    from zstandard import ZstdCompressor

    bomb = ZstdCompressor().compress(bytes(1 << 26))
    with pytest.raises(CorruptChunk, match="not of 4 bytes"):
        Lossless().decode([memoryview(bytes(12) + bomb)], (1, 1, 2, 1, 2), np.dtype("<f4"), 0)
