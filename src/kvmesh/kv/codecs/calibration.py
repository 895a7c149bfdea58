"""Makes a profile from KV of typical texts: means and spreads, then the distributions, clustered into classes.

Channels whose quantised values are distributed alike share a table (k-means under the cost in bits), for a table per
channel would be several times larger than the chunks it serves. Knows no model and no text; pure numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codecs import rans
from kvmesh.kv.codecs.cachegen import SINK_TOKENS
from kvmesh.kv.codecs.floats import Floats
from kvmesh.kv.codecs.profile import Level, Profile
from kvmesh.kv.codecs.quantiser import Quantiser

Array = npt.NDArray[Any]

CLASSES = 64
SYMBOLS = 64
"""Levels -31..31 and the escape."""
ANCHOR_SYMBOLS = 256
ANCHOR_BIN = 1 / 12
"""Bin of an anchor, in units of the spread: 8 bits reach to 10 of them."""
_ROUNDS = 12
_PRIOR = 0.25
"""Occurrences that each symbol near a seen one is credited with."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A level to make: `bins` in units of a layer's spread, for equal groups of layers from shallow to deep.

    `group`: tokens per anchor, 0 for none. `classes`: how many distributions to share.
    """

    bins: tuple[float, ...]
    group: int = 0
    classes: int = CLASSES


LEVELS = (Recipe((1.0,)), Recipe((0.65,)), Recipe((0.4,)), Recipe((0.2,)))
"""What a profile holds by default, coarse to fine."""
PAPER_BINS = tuple(0.65 * width for width in (0.5, 1.0, 1.5))
"""The paper's ratios around the same mean."""
ABLATIONS = (
    Recipe((0.65,), group=10),
    Recipe((0.65,), group=4),
    Recipe(PAPER_BINS),
    Recipe(PAPER_BINS, group=10),
    Recipe((0.65,), classes=1),
)
"""What CacheGen's parts are worth: anchors, their groups, bins that grow with depth, distributions per channel."""

Report = Callable[[int, int], None]


def calibrate(
    samples: Sequence[Array], revision: bytes, recipes: Iterable[Recipe] = LEVELS, report: Report | None = None
) -> Profile:
    """The profile of `samples`, each `[layers, planes, tokens, kv_heads, head_dim]` of one text from its start."""
    layers, planes, _, heads, dim = samples[0].shape
    texts = [sample[:, :, SINK_TOKENS:].reshape(layers * planes, -1, heads * dim) for sample in samples]
    means, spreads = _moments(texts)
    recipes = list(recipes)
    levels = []
    for number, recipe in enumerate(recipes):
        levels.append(_level(recipe, texts, means, spreads, layers))
        if report:
            report(number + 1, len(recipes))
    return Profile((layers, planes, heads, dim), revision, means, tuple(levels))


def _moments(texts: Sequence[Array]) -> tuple[Floats, Floats]:
    """Mean of each channel, rounded as the file holds it, and root mean square distance to it of each block."""
    tokens = sum(text.shape[1] for text in texts)
    sums = np.sum([text.sum(axis=1, dtype=np.float64) for text in texts], axis=0)
    squares = np.sum([np.square(text, dtype=np.float64).sum(axis=1) for text in texts], axis=0)
    means = np.clip(sums / tokens, -65504, 65504).astype("<f2").astype(np.float32)
    variances = squares / tokens - np.square(sums / tokens)
    return means, np.maximum(np.sqrt(np.maximum(variances, 0).mean(axis=1)), 1e-6).astype(np.float32)


def _level(recipe: Recipe, texts: Sequence[Array], means: Floats, spreads: Floats, layers: int) -> Level:
    steps = (spreads * _widths(recipe.bins, layers, len(spreads) // layers)).astype(np.float32)
    if not recipe.group:
        return Level(0, None, _learn(texts, means, steps, SYMBOLS, recipe.classes))
    anchor_steps = (spreads * ANCHOR_BIN).astype(np.float32)
    firsts = [text[:, :: recipe.group] for text in texts]
    anchors = _learn(firsts, means, anchor_steps, ANCHOR_SYMBOLS, recipe.classes)
    differences = [_differences(text, means, anchor_steps, recipe.group) for text in texts]
    return Level(recipe.group, anchors, _learn(differences, np.zeros_like(means), steps, SYMBOLS, recipe.classes))


def _widths(bins: Sequence[float], layers: int, planes: int) -> Floats:
    """The bin of each block."""
    of_layer = np.array(bins, np.float32)[np.arange(layers) * len(bins) // layers]
    return np.repeat(of_layer, planes)


def _differences(text: Array, means: Floats, steps: Floats, group: int) -> Floats:
    """What remains of the tokens that are no anchors, as the encoder will see it."""
    positions = np.arange(text.shape[1])
    rest = positions[positions % group > 0]
    centre, width = means[:, None], steps[:, None, None]
    decoded = np.rint((text[:, ::group] - centre) / width) * width + centre
    remainders: Floats = (text[:, rest] - decoded[:, rest // group]).astype(np.float32)
    return remainders


def _learn(texts: Sequence[Array], means: Floats, steps: Floats, symbols: int, classes: int) -> Quantiser:
    histograms = _histograms(texts, means, steps, symbols)
    members, weights = cluster(histograms, classes)
    tables = rans.Tables(rans.quantise(weights))
    return Quantiser(means, steps, members.reshape(means.shape).astype("<u2"), tables)


def _histograms(texts: Sequence[Array], means: Floats, steps: Floats, symbols: int) -> Array:
    """How often each channel has each symbol: float64 `[blocks * columns, symbols]`, the escape first."""
    blocks, columns = means.shape
    zero = symbols // 2
    counts = np.zeros((blocks, columns * symbols), np.int64)
    channel = np.arange(columns) * symbols
    for text in texts:
        for block in range(blocks):
            levels = np.rint((text[block] - means[block]) / steps[block])
            coded = np.where(np.abs(levels) < zero, levels + zero, 0).astype(np.int64)
            counts[block] += np.bincount((coded + channel).ravel(), minlength=columns * symbols)
    return counts.reshape(blocks * columns, symbols).astype(np.float64)


def cluster(histograms: Array, classes: int) -> tuple[Array, Array]:
    """The class of each channel and the weights of each class: Lloyd's rounds under the cost in bits."""
    totals = histograms.sum(axis=1, keepdims=True)
    shares = histograms / np.maximum(totals, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropies = -np.nansum(shares * np.log2(shares), axis=1)
    # Channels of equal entropy are mostly alike: equal slices of that order are a good start.
    members = np.empty(len(histograms), np.int64)
    members[np.argsort(entropies, kind="stable")] = np.arange(len(histograms)) * classes // len(histograms)
    for _ in range(_ROUNDS):
        weights = _weights(histograms, members, classes)
        costs = -np.log2(np.maximum(weights / weights.sum(axis=1, keepdims=True), 2.0**-16))
        members = np.argmin(shares @ costs.T, axis=1)
    return members, _weights(histograms, members, classes)


def _weights(histograms: Array, members: Array, classes: int) -> Array:
    """Sums of the members' histograms; the escape and symbols up to two beyond those seen are possible as well."""
    weights = np.zeros((classes, histograms.shape[1]))
    np.add.at(weights, members, histograms)
    for row in weights:
        seen = np.flatnonzero(row[1:]) + 1
        if len(seen):
            row[max(1, seen[0] - 2) : seen[-1] + 3] += _PRIOR
        row[0] += _PRIOR
    return weights
