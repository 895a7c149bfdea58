"""Synthetic KV and a small profile learnt from it, for tests of codecs."""

from functools import cache

import numpy as np

from kvmesh.kv.codecs.calibration import Recipe, calibrate
from kvmesh.kv.codecs.profile import Profile

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


@cache
def profile(revision: bytes = bytes(32)) -> Profile:
    return calibrate([kv(500, seed).astype(np.float16) for seed in (1, 2)], revision, RECIPES)
