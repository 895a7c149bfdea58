"""The transform codec: exact where it must be, finer with every quality layer, and firm against what is not its own."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.errors import InvalidArgument
from kvmesh.kv import bitstream
from kvmesh.kv.bitstream import CorruptChunk
from kvmesh.kv.codecs import basis as bases
from kvmesh.kv.codecs import profile as profiles
from kvmesh.kv.codecs.calibration import Recipe, calibrate
from kvmesh.kv.codecs.floats import to_float32
from kvmesh.kv.codecs.rotary import Rotary
from kvmesh.kv.codecs.transform import Transform
from tests.unit.kv.codec_profiles import kv, learnt, profile, transforming

LAYERS = 4


def stream(tokens: int, seed: int = 5, start: int = 256) -> tuple[np.ndarray, bytes]:
    data = kv(tokens, seed)
    return data, bitstream.encode(data, "float32", 0, Transform(transforming()), start)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_turning_is_undone(position, pairs, start):
    rng = np.random.default_rng(pairs)
    rotary = Rotary(rng.random((2, pairs)).astype(np.float32), start)
    keys = rng.normal(size=(2, 3, 2, start + 2 * pairs + 1)).astype(np.float32)
    back = rotary.apply(rotary.undo(keys, position), position)
    assert np.allclose(back, keys, atol=1e-5)
    angles = (position + np.arange(3))[:, None] * rotary.frequencies.astype(np.float64)[1]
    first, second = keys[1, ..., start : start + pairs], keys[1, ..., start + pairs : start + 2 * pairs]
    turned = (first + 1j * second) * np.exp(-1j * angles)[:, None]
    assert np.allclose(rotary.undo(keys, position)[1, ..., start : start + pairs], turned.real, atol=1e-4)
    assert (rotary.undo(keys, position)[..., :start] == keys[..., :start]).all()


def test_every_quality_layer_brings_it_closer():
    data, coded = stream(64)
    header = bitstream.read_header(coded)
    assert len(header.layer_ends) == LAYERS
    decoded = [bitstream.decode(coded[:end], Transform(transforming())) for end in header.layer_ends]
    assert [chunk.header.quality_layers for chunk in decoded] == [1, 2, 3, 4]
    errors = [np.square(chunk.data - data).mean() for chunk in decoded]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * data.var() < errors[0]


@pytest.mark.parametrize("level", range(1, LAYERS))
def test_a_level_is_a_prefix(level):
    data, coded = stream(40)
    alone = bitstream.encode(data, "float32", 0, Transform(transforming(), level), 256)
    read = bitstream.read_header(coded), bitstream.read_header(alone)
    assert len(read[1].layer_ends) == level
    parts = [[s[a:b] for a, b in h.spans][:level] for h, s in zip(read, (coded, alone), strict=True)]
    assert parts[0] == parts[1]
    codec = Transform(transforming())
    assert (bitstream.decode(alone, codec).data == bitstream.decode(bitstream.cut(coded, level), codec).data).all()


@pytest.mark.parametrize(("start", "tokens", "sinks"), [(0, 20, 4), (0, 3, 3), (0, 4, 4), (2, 20, 2), (4, 20, 0)])
def test_the_first_tokens_of_a_text_stay_in_half_precision(start, tokens, sinks):
    data, coded = stream(tokens, 11, start)
    half = data.astype("<f2").astype("<f4")
    for count in (1, LAYERS):
        back = bitstream.decode(bitstream.cut(coded, count), Transform(transforming())).data
        assert (back[:, :, :sinks] == half[:, :, :sinks]).all()
        assert (back[:, :, sinks:] != half[:, :, sinks:]).any() == (sinks < tokens)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    data = kv(40, seed=6)
    data = data.astype("<f2") if dtype == "float16" else (data.view("<u4") >> 16).astype("<u2")
    codec = Transform(transforming())
    back = bitstream.decode(bitstream.encode(data, dtype, 0, codec, 300), codec).data
    assert back.dtype == data.dtype
    assert np.square(to_float32(back) - to_float32(data)).mean() < 0.02 * to_float32(data).var()


@pytest.mark.parametrize(
    ("planes", "heads", "dim", "pairs", "start"), [(1, 1, 40, 4, 32), (2, 1, 8, 4, 0), (2, 6, 4, 0, 0)]
)
def test_latent_multi_query_and_multi_head_layouts(planes, heads, dim, pairs, start):
    samples = [np.random.default_rng(i).normal(size=(2, planes, 200, heads, dim)).astype("<f4") for i in (1, 2)]
    made = calibrate(samples, bytes(32), [Recipe((0.5,), classes=4)])
    codec = Transform(replace(made, transform=learnt((2, planes, heads, dim), samples, pairs, start)))
    back = bitstream.decode(bitstream.encode(samples[0], "float32", 0, codec, 256), codec).data
    assert np.square(back - samples[0]).mean() < 0.05


def test_the_profile_comes_back():
    back = profiles.parse(transforming().data)
    assert (back.data, back.hash) == (transforming().data, transforming().hash)
    data = kv(30)
    assert Transform(back).encode(data, 0) == Transform(transforming()).encode(data, 0)


def test_a_basis_is_orthonormal_and_close_to_what_it_was_made_of():
    rng = np.random.default_rng(0)
    components = np.linalg.qr(rng.normal(size=(64, 64)))[0][:24].astype(np.float32)
    made = bases.make(np.zeros((8, 8)), np.tile(np.eye(8), (8, 1, 1)), components, (8, 8, 8))
    assert np.allclose(made.components @ made.components.T, np.eye(24), atol=1e-5)
    kept = np.square(components @ made.components.T).sum(axis=1)
    assert kept[:8].min() > 0.999
    assert kept[8:16].min() > 0.97
    assert kept[16:].min() > 0.8


def test_namespaces_differ_by_profile_and_not_by_level():
    codecs = [Transform(transforming()), Transform(transforming(), 1), Transform(transforming(b"x" * 32))]
    assert [codec.namespace == codecs[0].namespace for codec in codecs] == [True, True, False]


def test_kv_of_some_of_the_layers_is_refused():
    for data, first_layer in ((kv(4)[:, :1], 0), (kv(4)[:3], 0), (kv(4), 1)):
        with pytest.raises(ValueError, match="does not fit"):
            Transform(transforming()).encode(np.ascontiguousarray(data), first_layer)


def test_another_profile_is_refused_with_a_reason():
    _, coded = stream(8)
    with pytest.raises(CorruptChunk, match=f"profile {transforming().hash[:16].hex()}"):
        bitstream.decode(coded, Transform(transforming(b"x" * 32)))


@pytest.mark.parametrize("level", [0, LAYERS + 1])
def test_there_is_no_level_beyond_the_profile_s(level):
    with pytest.raises(InvalidArgument, match="level"):
        Transform(transforming(), level)


def test_a_profile_without_a_transform_or_with_one_that_cannot_be_undone_is_refused():
    with pytest.raises(InvalidArgument, match="no transform"):
        Transform(profile())
    whole = transforming().transform
    assert whole is not None
    flat = replace(whole.bases[0], roots=np.zeros_like(whole.bases[0].roots))
    with pytest.raises(InvalidArgument, match="root"):
        Transform(replace(profile(), transform=replace(whole, bases=(flat, whole.bases[1]))))
