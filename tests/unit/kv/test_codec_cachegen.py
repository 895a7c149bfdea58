"""CacheGen's bitstream: its error bound, its size, chunks that stand alone, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.errors import InvalidArgument
from kvmesh.kv import bitstream
from kvmesh.kv.bitstream import CorruptChunk
from kvmesh.kv.codec import CACHEGEN
from kvmesh.kv.codecs.cachegen import CacheGen
from kvmesh.kv.codecs.calibration import Recipe, calibrate
from kvmesh.kv.codecs.floats import to_float32
from kvmesh.kv.header import head_bytes
from tests.unit.kv.codec_fuzz import sealed
from tests.unit.kv.codec_profiles import LAYERS, PLANES, RECIPES, kv, profile

LEVELS = range(1, len(RECIPES) + 1)
GROUPED = 3


def steps(level: int) -> np.ndarray:
    return profile().levels[level - 1].body.steps.reshape(LAYERS, PLANES, 1, 1, 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 256])
def test_every_value_is_within_half_a_step(level, tokens):
    """Outliers included: what the tables do not cover is escaped, not cut off."""
    data, codec = kv(tokens, seed=5), CacheGen(profile(), level)
    error = np.abs(bitstream.decode(bitstream.encode(data, "float32", 0, codec, start=256), codec).data - data)
    positions = np.arange(tokens)
    anchors = profile().levels[level - 1].anchors
    bound = np.where(np.ones((LAYERS, PLANES, tokens, 1, 1), bool), steps(level), 0)
    if anchors:
        bound[:, :, positions % 10 == 0] = anchors.steps.reshape(LAYERS, PLANES, 1, 1, 1)
    assert (error <= 0.5001 * bound + 1e-4 * np.abs(data)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    data = kv(40, seed=6)
    data = data.astype("<f2") if dtype == "float16" else (data.view("<u4") >> 16).astype("<u2")
    codec = CacheGen(profile(), 2)
    back = bitstream.decode(bitstream.encode(data, dtype, 0, codec), codec).data
    assert back.dtype == data.dtype
    values = to_float32(data)
    assert (np.abs(to_float32(back) - values) <= 0.51 * steps(2) + np.abs(values) * 2.0**-8).all()


def test_smaller_steps_cost_more_and_all_less_than_int8():
    data = kv(256, seed=7)
    sizes = [len(CacheGen(profile(), level).encode(data, 0, start=256)[0]) for level in (1, 2)]
    assert sizes[0] < sizes[1] < data.size


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("start", "tokens", "sinks"), [(0, 20, 4), (0, 3, 3), (0, 4, 4), (2, 20, 2), (4, 20, 0)])
def test_the_first_tokens_of_a_text_stay_in_half_precision(level, start, tokens, sinks):
    data, codec = kv(tokens, seed=11), CacheGen(profile(), level)
    back = bitstream.decode(bitstream.encode(data, "float32", 0, codec, start), codec).data
    half = data.astype("<f2").astype("<f4")
    assert (back[:, :, :sinks] == half[:, :, :sinks]).all()
    assert (back[:, :, sinks:] != half[:, :, sinks:]).any() == (sinks < tokens)


def test_a_range_of_layers_decodes_by_itself():
    data, codec = kv(30, seed=8), CacheGen(profile(), GROUPED)
    part = np.ascontiguousarray(data[1:3])
    back = bitstream.decode(bitstream.encode(part, "float32", 1, codec), codec).data
    assert (back == bitstream.decode(bitstream.encode(data, "float32", 0, codec), codec).data[1:3]).all()


@pytest.mark.parametrize(("heads", "dim"), [(1, 7), (1, 40), (9, 8)])
@pytest.mark.parametrize("planes", [1, 2])
def test_latent_multi_query_and_multi_head_layouts(planes, heads, dim):
    rng = np.random.default_rng(3)
    data = rng.normal(size=(2, planes, 40, heads, dim)).astype("<f4")
    codec = CacheGen(calibrate([data], bytes(32), [Recipe((0.5,), classes=4)]), 1)
    back = bitstream.decode(bitstream.encode(data, "float32", 0, codec, start=256), codec).data
    bound = codec.profile.levels[0].body.steps.reshape(2, planes, 1, 1, 1)
    assert (np.abs(back - data) <= 0.5001 * bound).all()


def test_the_same_chunk_always_has_the_same_bytes():
    data = kv(30)
    assert CacheGen(profile(), 2).encode(data, 0) == CacheGen(profile(), 2).encode(data.copy(), 0)


def test_kv_that_does_not_fit_the_profile_is_refused():
    codec = CacheGen(profile(), 1)
    for data, first_layer in ((kv(4)[:, :1], 0), (kv(4)[..., :3], 0), (kv(4), 1)):
        with pytest.raises(ValueError, match="does not fit"):
            codec.encode(np.ascontiguousarray(data), first_layer)


def test_another_profile_or_level_is_refused_with_a_reason():
    data, other = kv(10), profile(b"x" * 32)
    stream = bitstream.encode(data, "float32", 0, CacheGen(profile(), 1))
    with pytest.raises(CorruptChunk, match=f"profile {profile().hash[:16].hex()}"):
        bitstream.decode(stream, CacheGen(other, 1))
    with pytest.raises(CorruptChunk, match="level 1 where 1 and 2"):
        bitstream.decode(stream, CacheGen(profile(), 2))


def test_namespaces_differ_by_level_and_profile():
    codecs = [CacheGen(profile(), 1), CacheGen(profile(), 2), CacheGen(profile(b"x" * 32), 1)]
    assert len({codec.namespace for codec in codecs}) == 3


@pytest.mark.parametrize("level", [0, len(RECIPES) + 1])
def test_there_is_no_level_beyond_the_profile_s(level):
    with pytest.raises(InvalidArgument, match="level"):
        CacheGen(profile(), level)


def test_a_shape_that_lies_is_refused_before_anything_of_its_size_is_made():
    codec = CacheGen(profile(), 1)
    parts = [memoryview(part) for part in codec.encode(kv(4), 0)]
    with pytest.raises(CorruptChunk):
        codec.decode(parts, (LAYERS, PLANES, 2**20, 2, 5), np.dtype("<f4"), 0)
    assert not CACHEGEN.fits(2**20, (1, 2, 4, 2, 5), 4)


HEAD = head_bytes(1)
STREAMS = {level: bitstream.encode(kv(23, seed=9), "float32", 0, CacheGen(profile(), level)) for level in LEVELS}


@given(st.sampled_from(LEVELS), st.data())
@settings(max_examples=1000, deadline=None)
def test_forged_streams_are_refused_or_finite(level, data):
    stream, codec = bytearray(STREAMS[level]), CacheGen(profile(), level)
    for _ in range(data.draw(st.integers(1, 5))):
        start = 4 if data.draw(st.booleans()) else HEAD
        stream[data.draw(st.integers(start, min(len(stream), start + 120) - 1))] = data.draw(st.integers(0, 255))
    for _ in range(data.draw(st.integers(0, 3))):
        stream[data.draw(st.integers(HEAD, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    del stream[data.draw(st.integers(HEAD, len(stream))) if data.draw(st.booleans()) else len(stream) :]
    try:
        chunk = bitstream.decode(sealed(stream), codec)
    except CorruptChunk:
        return
    assert chunk.data.shape == chunk.header.shape
    assert np.isfinite(to_float32(chunk.data)).all()
