"""int8 and fp8: how far off they may be, for every dtype, and what they refuse."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.kv import bitstream
from kvmesh.kv.bitstream import CorruptChunk
from kvmesh.kv.codec import FP8, INT8, Raw
from kvmesh.kv.codecs.floats import to_float32
from kvmesh.kv.codecs.fp8 import Fp8, numbers
from kvmesh.kv.codecs.int8 import Int8
from tests.unit.kv.codec_profiles import kv

CODECS = [Int8(), Fp8()]


def as_dtype(data: np.ndarray, dtype: str) -> np.ndarray:
    return (data.view("<u4") >> 16).astype("<u2") if dtype == "bfloat16" else data.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 256])
def test_int8_is_within_half_a_step_of_its_channel(dtype, tokens):
    data = as_dtype(kv(tokens), dtype)
    back = bitstream.decode(bitstream.encode(data, dtype, 3, Int8()), Int8()).data
    assert (back.shape, back.dtype) == (data.shape, data.dtype)
    values = to_float32(data)
    starts = np.arange(0, tokens, 128)
    step = np.repeat(np.maximum.reduceat(np.abs(values), starts, axis=2) / 127, 128, axis=2)[:, :, :tokens]
    rounding = 0 if dtype == "float32" else np.abs(values) * 2.0**-8
    assert (np.abs(to_float32(back) - values) <= 0.502 * step + rounding + 1e-6).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_fp8_is_within_half_of_its_last_place(dtype):
    data = as_dtype(kv(50), dtype)
    back = bitstream.decode(bitstream.encode(data, dtype, 0, Fp8()), Fp8()).data
    values = to_float32(data)
    smallest = np.abs(values).max(axis=(2, 4), keepdims=True) / 448 * 2.0**-9
    assert (np.abs(to_float32(back) - values) <= np.abs(values) * (2.0**-4 + 2.0**-8) + smallest).all()


def test_fp8_numbers_are_torch_s():
    torch = pytest.importorskip("torch")
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(numbers(), theirs, equal_nan=True)


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_zeros(codec):
    data = np.zeros((2, 1, 7, 1, 3), "<f4")
    assert not bitstream.decode(bitstream.encode(data, "float32", 0, codec), codec).data.any()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_encoded(codec, bad):
    data = kv(3)
    data[1, 1, 2, 1, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        bitstream.encode(data, "float32", 0, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_another_codec_is_refused(codec):
    stream = bitstream.encode(kv(3), "float32", 0, codec)
    with pytest.raises(CorruptChunk, match=codec.format.name):
        bitstream.decode(stream, Raw())
    with pytest.raises(CorruptChunk, match="raw"):
        bitstream.decode(bitstream.encode(kv(3), "float32", 0), codec)


@given(st.sampled_from(CODECS), st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_payloads_are_refused_or_finite(codec, data):
    chunk = kv(5)
    payload = bytearray(codec.encode(chunk, 0)[0])
    for _ in range(data.draw(st.integers(1, 6))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CorruptChunk):
        assert np.isfinite(codec.decode([memoryview(payload)], chunk.shape, chunk.dtype, 0)).all()


@given(st.integers(0, 2000))
def test_only_the_exact_length_fits(size):
    shape = (2, 2, 7, 1, 4)
    data = np.zeros(shape, "<f4")
    for codec, format in ((Int8(), INT8), (Fp8(), FP8)):
        assert format.fits(size, shape, 4) == (size == len(codec.encode(data, 0)[0]))
