"""A profile comes back as it was, or is refused; a setting becomes a codec, or is explained."""

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.errors import InvalidArgument, NotFound
from kvmesh.kv.codecs.cachegen import DEFAULT_LEVEL, CacheGen
from kvmesh.kv.codecs.calibration import LEVELS, Recipe, calibrate
from kvmesh.kv.codecs.choice import PROFILE_NAME, check_setting, find_profile, open_codec, parse
from kvmesh.kv.codecs.profile import HASH_BYTES
from kvmesh.kv.codecs.profile import parse as parse_profile
from tests.unit.kv.codec_profiles import RECIPES, SHAPE, kv, profile


def signed(content: bytes) -> bytes:
    return content + sha256(content).digest()


def test_round_trip():
    back = parse_profile(profile().data)
    assert (back.data, back.hash, back.shape, back.revision) == (
        profile().data,
        profile().hash,
        SHAPE,
        bytes(32),
    )
    assert [level.group for level in back.levels] == [recipe.group for recipe in RECIPES]


@given(st.data())
@settings(max_examples=200)
def test_any_change_is_noticed(data):
    changed = bytearray(profile().data)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidArgument):
        parse_profile(bytes(changed))


@given(st.data())
@settings(max_examples=1000, deadline=None)
def test_forged_profiles_are_refused_or_usable(data):
    """The hash only names the content: who can write the file can make it hold."""
    content = bytearray(profile().data[:-HASH_BYTES])
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from([16, 200, len(content)]))
        content[data.draw(st.integers(0, near - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) if data.draw(st.booleans()) else len(content) :]
    try:
        read = parse_profile(signed(bytes(content)))
    except InvalidArgument:
        return
    values = np.zeros((read.blocks, 3, read.columns), np.float32)
    body = read.levels[0].body
    assert np.isfinite(body.decode(body.encode(values), 3)).all()


def test_classes_cost_little_against_a_table_for_every_channel():
    samples = [np.clip(kv(2000, seed), -9, 9) for seed in (1, 2)]
    shared, single = (
        calibrate(samples, bytes(32), [Recipe((0.5,), classes=classes)]).levels[0].body for classes in (24, 1)
    )
    values = np.clip(kv(2000, seed=3), -9, 9).reshape(8, 2000, 10)
    levels = np.rint((values - shared.means[:, None]) / shared.steps[:, None, None])
    histograms = [np.unique(levels[b, :, c], return_counts=True)[1] for b in range(8) for c in range(10)]
    ideal = sum(-(h * np.log2(h / h.sum())).sum() for h in histograms) / values.size
    bits = [8 * len(body.encode(np.ascontiguousarray(values))) / values.size for body in (shared, single)]
    assert bits[0] < 1.06 * ideal
    assert bits[0] < 0.95 * bits[1]


def test_finer_levels_have_smaller_steps():
    bins = [recipe.bins[0] for recipe in LEVELS]
    assert bins == sorted(bins, reverse=True)
    assert len(LEVELS) >= DEFAULT_LEVEL


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("raw", ("raw", None)),
        ("lossless", ("lossless", None)),
        ("cachegen", ("cachegen", None)),
        ("cachegen:3", ("cachegen", 3)),
        ("transform", ("transform", None)),
        ("transform:2", ("transform", 2)),
    ],
)
def test_settings(setting, expected):
    assert parse(setting) == expected
    assert check_setting(setting) == setting


@pytest.mark.parametrize(
    "setting", ["", "zip", "int8:2", "raw:", "cachegen:", "cachegen:0", "cachegen:x", "cachegen:-1"]
)
def test_bad_settings(setting):
    with pytest.raises(InvalidArgument, match="codec"):
        parse(setting)
    with pytest.raises(ValueError, match="codec"):
        check_setting(setting)


def test_a_codec_without_its_profile_is_explained():
    with pytest.raises(NotFound, match="kvmesh kv calibrate"):
        open_codec("cachegen", SHAPE)
    with pytest.raises(InvalidArgument, match="shape"):
        open_codec("cachegen:1", (9, 2, 2, 5), profile())
    with pytest.raises(InvalidArgument, match="level 9"):
        open_codec("cachegen:9", SHAPE, profile())
    with pytest.raises(InvalidArgument, match="no transform"):
        open_codec("transform", SHAPE, profile())
    assert open_codec("cachegen", SHAPE, profile()).namespace == CacheGen(profile(), DEFAULT_LEVEL).namespace
    assert open_codec("cachegen:1", SHAPE, profile()).namespace.endswith(profile().hash.hex())


def test_where_a_profile_is_found(tmp_path):
    assert find_profile(None, tmp_path, "no-such-model") is None
    with pytest.raises(NotFound, match="no codec profile"):
        find_profile(tmp_path / "absent", tmp_path, "m")
    (tmp_path / PROFILE_NAME).write_bytes(profile().data)
    found = find_profile(None, tmp_path, "m")
    assert found is not None
    assert found.hash == profile().hash
    (tmp_path / "bad").write_bytes(b"KVMP")
    with pytest.raises(InvalidArgument, match="not a codec profile"):
        find_profile(tmp_path / "bad", tmp_path, "m")
