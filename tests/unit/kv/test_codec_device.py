"""Codecs whose arithmetic is torch's, on the CPU and on CUDA where there is one, against those of numpy and numba."""

import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.kv import bitstream
from kvmesh.kv.bitstream import CorruptChunk
from kvmesh.kv.codec import CACHEGEN, CODECS, RAW
from kvmesh.kv.codecs import embedded
from kvmesh.kv.codecs.adaptive import Adaptive, member
from kvmesh.kv.codecs.cachegen import CacheGen
from kvmesh.kv.codecs.calibration import Recipe, calibrate
from kvmesh.kv.codecs.choice import open_codec
from kvmesh.kv.codecs.floats import from_float32, to_float32
from kvmesh.kv.codecs.rotary import Rotary
from kvmesh.kv.codecs.transform import Transform
from kvmesh.kv.cuda.basis import turn
from kvmesh.kv.cuda.cachegen import DeviceCacheGen
from kvmesh.kv.cuda.device import Device
from kvmesh.kv.cuda.halves import HalfBasis, halved, supported
from kvmesh.kv.cuda.placement import Placed, moved
from kvmesh.kv.cuda.transform import DeviceTransform, dequantise, quantise
from tests.unit.kv.codec_fuzz import forge
from tests.unit.kv.codec_profiles import LAYERS, RECIPES, SHAPE, kv, learnt, profile, transforming

WIRE = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
ROUNDING = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
"""Of the largest value, within which sums that round otherwise agree."""
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
on_devices = pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])])
on_dtypes = pytest.mark.parametrize("dtype", WIRE)


@cache
def device(name: str) -> Device:
    return Device(name)


@cache
def transforms(name: str, level: int | None = None) -> tuple[Transform, DeviceTransform]:
    host = Transform(transforming(), level)
    return host, DeviceTransform(host, device(name))


def parts_of(codec, data: np.ndarray, first_layer: int = 0, start: int = 0) -> list[memoryview]:
    return [memoryview(part) for part in codec.encode(data, first_layer, start)]


def close(first: np.ndarray, second: np.ndarray, dtype: str) -> bool:
    one, other = to_float32(first), to_float32(second)
    return bool(np.abs(one - other).max(initial=0) <= ROUNDING[dtype] * np.abs(one).max(initial=1))


@on_devices
@on_dtypes
@given(
    level=st.integers(1, len(RECIPES)),
    tokens=st.integers(1, 33),
    start=st.sampled_from([0, 2, 256]),
    span=st.sampled_from([(0, LAYERS), (1, 2), (3, 1)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_cachegen_gives_the_same_bytes_and_values(name, dtype, level, tokens, start, span, seed):
    first, layers = span
    host = CacheGen(profile(), level)
    there = DeviceCacheGen(host, device(name))
    data = from_float32(kv(tokens, seed, layers), np.dtype(WIRE[dtype]))
    parts = parts_of(host, data, first, start)
    assert parts_of(there, data, first, start) == parts
    decoded = there.decode(parts, data.shape, data.dtype, first)
    assert decoded.dtype == data.dtype
    assert (decoded == host.decode(parts, data.shape, data.dtype, first)).all()


@on_devices
@on_dtypes
@given(tokens=st.integers(1, 33), start=st.sampled_from([0, 3, 256, 60000]), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_every_prefix_of_a_transform_decodes_to_the_same(name, dtype, tokens, start, seed):
    host, there = transforms(name)
    data = from_float32(kv(tokens, seed), np.dtype(WIRE[dtype]))
    parts = parts_of(host, data, 0, start)
    for count in range(1, len(parts) + 1):
        decoded = there.decode(parts[:count], data.shape, data.dtype, 0)
        assert decoded.shape == data.shape
        assert close(host.decode(parts[:count], data.shape, data.dtype, 0), decoded, dtype)


@on_devices
@pytest.mark.parametrize(("planes", "heads", "dim", "pairs", "start"), [(1, 1, 40, 4, 32), (2, 6, 4, 0, 0)])
def test_a_latent_and_keys_that_do_not_turn_decode_to_the_same(name, planes, heads, dim, pairs, start):
    samples = [np.random.default_rng(i).normal(size=(2, planes, 200, heads, dim)).astype("<f4") for i in (1, 2)]
    made = calibrate(samples, bytes(32), [Recipe((0.5,), classes=4)])
    host = Transform(replace(made, transform=learnt((2, planes, heads, dim), samples, pairs, start)))
    there, data = DeviceTransform(host, device(name)), samples[0][:, :, :30]
    parts = parts_of(there, data)
    decoded = [codec.decode(parts, data.shape, data.dtype, 0) for codec in (host, there)]
    assert close(*decoded, "float32")
    assert np.square(decoded[1] - data).mean() < 0.05


@on_devices
@on_dtypes
@pytest.mark.parametrize("level", [1, 3, None])
def test_a_transform_made_on_a_device_is_as_good_and_as_small(name, dtype, level):
    host, there = transforms(name, level)
    data = from_float32(kv(48, 7), np.dtype(WIRE[dtype]))
    ours, theirs = parts_of(host, data), parts_of(there, data)
    assert len(ours) == len(theirs)
    sizes = [sum(map(len, parts)) for parts in (ours, theirs)]
    assert abs(sizes[0] - sizes[1]) <= 0.005 * sizes[0]
    errors = [
        np.square(to_float32(host.decode(parts, data.shape, data.dtype, 0)) - to_float32(data)).mean()
        for parts in (ours, theirs)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@on_devices
@given(
    st.lists(st.floats(-(2**20), 2**20, width=32), min_size=1, max_size=50),
    st.integers(1, 6),
    st.sampled_from([0.25, 1, 4]),
)
@settings(max_examples=60, deadline=None)
def test_cells_are_equal_bit_by_bit(name, values, renditions, step):
    edges = np.arange(-4, 5, dtype=np.float32) * np.float32(step / 2)
    matrix = np.concatenate((np.array(values, np.float32), edges, np.float32([3e38, -3e38])))[None]
    expected = embedded.quantise(matrix, step, renditions)[-1]
    cells = quantise(device(name).up(matrix), step, renditions)
    assert (cells.cpu().numpy() == expected).all()
    assert (dequantise(cells, step).cpu().numpy() == embedded.dequantise(expected, np.float32(step))).all()


@on_devices
@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 3), st.sampled_from([-1, 1]))
@settings(max_examples=30, deadline=None)
def test_keys_turn_alike(name, position, pairs, start, sense):
    rng = np.random.default_rng(pairs)
    rotary = Rotary(rng.random((2, pairs)).astype(np.float32), start)
    keys = rng.normal(size=(2, 3, 2, start + 2 * pairs + 1)).astype(np.float32)
    expected = (rotary.apply if sense > 0 else rotary.undo)(keys, position)
    assert (turn(rotary, device(name).up(keys), position, sense, device(name)).cpu().numpy() == expected).all()


def verdict(codec, stream: bytes) -> np.ndarray | str:
    try:
        return bitstream.decode(stream, codec).data
    except CorruptChunk as error:
        return str(error)


def forgeries(host, there) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """dtype and values of forged streams that both take; what one refuses the other refuses for the same reason."""
    dice, taken, refused = random.Random(1), [], 0
    streams = [bitstream.encode(kv(tokens, seed=tokens), "float32", 0, host) for tokens in (1, 11, 16)]
    for _ in range(400):
        forged = forge(dice.choice(streams), dice)
        expected, found = verdict(host, forged), verdict(there, forged)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
            refused += 1
            continue
        assert np.isfinite(to_float32(found)).all()
        taken.append((bitstream.read_header(forged).dtype, expected, found))
    assert refused > 0
    return taken


@on_devices
@pytest.mark.parametrize("codec", ["transform", *(f"cachegen:{level + 1}" for level in range(len(RECIPES)))])
def test_forged_streams_meet_the_same_verdict(name, codec):
    host = open_codec(codec, SHAPE, transforming())
    taken = forgeries(host, moved(host, device(name)))
    assert taken
    assert all(close(expected, found, dtype) for dtype, expected, found in taken)


def test_halved_products_refuse_the_same_forged_streams():
    host = Transform(transforming())
    assert forgeries(host, halved(host))


@on_devices
def test_what_is_not_finite_or_of_another_shape_is_refused(name):
    data = kv(8)
    data[1, 0, 3] = np.nan
    for codec in ("transform", "cachegen"):
        there = moved(open_codec(codec, SHAPE, transforming()), device(name))
        with pytest.raises(ValueError, match="not finite"):
            there.encode(data, 0)
        with pytest.raises(ValueError, match="does not fit"):
            there.encode(kv(8), 1)
        with pytest.raises(CorruptChunk):
            there.decode([memoryview(b"")], data.shape, data.dtype, 0)


@on_devices
def test_an_adaptive_codec_of_a_device_reads_what_the_hosts_wrote(name):
    for setting in ("auto", "adaptive"):
        host = open_codec(setting, SHAPE, transforming(), warm=False)
        there = open_codec(setting, SHAPE, transforming(), warm=False, device=name)
        assert isinstance(there, Adaptive)
        assert there.namespace == host.namespace
        for each in there.members:
            stream = bitstream.encode(kv(6), "float32", 0, member(host, each.format.id))
            assert bitstream.decode(stream, each).header.codec == each.format.id


@on_devices
def test_only_codecs_with_levels_are_moved(name):
    assert moved(open_codec("raw", SHAPE), device(name)).format is RAW
    assert isinstance(moved(open_codec("cachegen:1", SHAPE, profile()), device(name)), Placed)
    assert isinstance(open_codec("cachegen:1", SHAPE, profile()), CacheGen)


def test_a_cpu_halves_the_products_of_transforms_where_it_has_the_instruction():
    codec = open_codec("transform:2", SHAPE, transforming(), device="cpu")
    assert isinstance(codec, Transform)
    assert {isinstance(basis, HalfBasis) for basis in codec.transform.bases} == {supported()}
    assert isinstance(open_codec("cachegen:1", SHAPE, profile(), device="cpu"), CacheGen)


def test_halved_products_mean_the_same():
    host = Transform(transforming())
    halves = halved(host)
    assert (halves.namespace, halves.profile.data) == (host.namespace, host.profile.data)
    data = kv(64)
    stream = bitstream.encode(data, "float32", 0, halves, 256)
    for end in bitstream.read_header(stream).layer_ends:
        exact, rounded = (bitstream.decode(stream[:end], codec).data for codec in (host, halves))
        assert np.square(rounded - exact).mean() < 2**-16 * np.square(data).mean()
    assert np.square(rounded - data).mean() < 1e-3 * data.var()


@dataclass
class Full:
    """A device without memory."""

    format = CODECS[CACHEGEN.id]
    namespace = ""

    def encode(self, *_):
        raise torch.OutOfMemoryError

    def decode(self, *_):
        raise torch.OutOfMemoryError


def test_a_device_without_memory_leaves_the_work_to_the_host(caplog):
    host = CacheGen(profile(), 1)
    placed, data = Placed(Full(), host), kv(8)
    parts = parts_of(placed, data)
    assert parts == parts_of(host, data)
    assert (placed.decode(parts, data.shape, data.dtype, 0) == host.decode(parts, data.shape, data.dtype, 0)).all()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert (placed.namespace, placed.format) == (host.namespace, host.format)
