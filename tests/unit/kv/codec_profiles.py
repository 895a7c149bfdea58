"""Synthetic KV and a small profile learnt from it, for tests of codecs."""

from dataclasses import replace
from functools import cache

import numpy as np

from kvmesh.kv.codecs.calibration import Recipe, calibrate
from kvmesh.kv.codecs.profile import Profile
from kvmesh.kv.codecs.rotary import Rotary
from kvmesh.kv.codecs.transform_calibration import Design, Statistics, learn
from kvmesh.kv.codecs.transform_profile import TransformProfile

LAYERS, PLANES, HEADS, DIM = 4, 2, 2, 5
SHAPE = (LAYERS, PLANES, HEADS, DIM)
RECIPES = (Recipe((1.0,), classes=8), Recipe((0.25, 0.5), classes=8), Recipe((0.5,), group=10, classes=8))


def kv(tokens: int, seed: int = 0, layers: int = LAYERS) -> np.ndarray:
    """float32 with channels of unlike spreads and offsets, an outlier now and then."""
    rng = np.random.default_rng(seed)
    spread = np.exp(np.random.default_rng(99).normal(0, 1, (layers, PLANES, 1, HEADS, DIM)))
    values = rng.normal(size=(layers, PLANES, tokens, HEADS, DIM)) * spread + spread
    values[rng.random(values.shape) < 1e-3] *= 200
    return values.astype("<f4")


def learnt(shape: tuple[int, int, int, int], samples: list[np.ndarray], pairs: int, start: int) -> TransformProfile:
    """A transform of few components, from samples whose gradients are as if all values counted alike."""
    frequencies = np.tile((0.5 ** np.arange(pairs)).astype("<f4"), (shape[0], 1))
    statistics = Statistics(shape, Rotary(frequencies, start))
    for seed, sample in enumerate(samples):
        statistics.add(sample)
        statistics.judge(np.random.default_rng(seed).normal(size=sample.shape))
    design = Design(step=0.1, reach=(0.5, 0.8, 1.0), shares=((0.1, 0.2, 0.3),) * shape[1])
    return learn(statistics, samples, design)


@cache
def profile(revision: bytes = bytes(32)) -> Profile:
    return calibrate([kv(500, seed).astype(np.float16) for seed in (1, 2)], revision, RECIPES)


@cache
def transforming(revision: bytes = bytes(32)) -> Profile:
    """With a transform whose keys turn in dimensions 1 to 4."""
    return replace(profile(revision), transform=learnt(SHAPE, [kv(500, 1), kv(500, 2)], 2, 1))
