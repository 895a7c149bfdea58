"""Makes a transform from KV of typical texts, and from the gradients of the model's own predictions by it.

The sensitivity of a head is the Fisher information of its KV: the mean of g gᵀ, with g the gradient of the logarithm
of the probability of tokens that the model itself would choose. To second order, an error e in the KV changes those
predictions by a Kullback-Leibler divergence of eᵀ (mean g gᵀ) e / 2, so that steps are in units that depend on no
model: square roots of nats. Knows no model and no text; pure numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codecs import basis as bases
from kvmesh.kv.codecs import embedded, rans
from kvmesh.kv.codecs.cachegen import SINK_TOKENS
from kvmesh.kv.codecs.calibration import cluster
from kvmesh.kv.codecs.embedded import CONTEXTS, First, Refinement
from kvmesh.kv.codecs.floats import Floats
from kvmesh.kv.codecs.quantiser import Quantiser
from kvmesh.kv.codecs.rotary import Rotary
from kvmesh.kv.codecs.transform_profile import TransformProfile

Array = npt.NDArray[Any]
Report = Callable[[int, int], None]

FIRST_SYMBOLS, DETAIL_SYMBOLS = 64, 16
CLASSES, REFINEMENT_CLASSES = 64, 24
_LEAST = 1e-4
"""Of a head's largest sensitivity: none of its directions counts for less."""
_PRIOR = 0.25


@dataclass(frozen=True, slots=True)
class Design:
    """What a transform shall be.

    `step`: of the finest rendition, in square roots of nats; `detail`: of the detail, in units of `step`. `reach`: for
    each rendition, coarse to fine, which share of the components it has.
    `shares`: for each plane how many components have 8, 4 and 2 bits, in shares of its dimensions.
    """

    step: float = 0.007
    detail: float = 0.5
    reach: tuple[float, ...] = (0.28, 0.46, 0.75, 1.0)
    shares: tuple[tuple[float, float, float], ...] = ((0.011, 0.056, 0.163), (0.011, 0.09, 0.279))


class Statistics:
    """Sums over texts, each `[layers, planes, tokens, kv_heads, head_dim]` from its start; no text is kept."""

    def __init__(self, shape: tuple[int, int, int, int], rotary: Rotary) -> None:
        layers, self.planes, heads, self.dim = shape
        self.rotary = rotary
        self.layers, self.heads = layers, layers * heads
        width = self.heads * self.dim
        self._tokens = self._judged = 0
        self._sums = np.zeros((self.planes, width))
        self._products = np.zeros((self.planes, width, width), np.float32)
        self._fisher = np.zeros((self.planes, self.heads, self.dim, self.dim))

    def add(self, kv: Array) -> None:
        """KV of one text."""
        for plane, values in enumerate(self.by_plane(kv)):
            self._sums[plane] += values.sum(axis=0, dtype=np.float64)
            self._products[plane] += values.T @ values
        self._tokens += kv.shape[2] - SINK_TOKENS

    def judge(self, gradients: Array) -> None:
        """Gradients of the sum of log-probabilities over one text, by its KV."""
        for plane, values in enumerate(self.by_plane(gradients)):
            by_head = values.reshape(-1, self.heads, self.dim).transpose(1, 2, 0)
            self._fisher[plane] += by_head @ by_head.transpose(0, 2, 1)
        self._judged += gradients.shape[2] - SINK_TOKENS

    def by_plane(self, kv: Array) -> Iterator[Floats]:
        """`[tokens, layers * heads * dim]` of each plane, keys turned back, without the sinks."""
        for plane in range(self.planes):
            values = kv[:, plane, SINK_TOKENS:].astype(np.float32)
            turned = values if plane else self.rotary.undo(values, SINK_TOKENS)
            yield np.ascontiguousarray(turned.transpose(1, 0, 2, 3)).reshape(turned.shape[1], -1)

    def means(self, plane: int) -> Array:
        """`[heads, dim]`."""
        means: Array = (self._sums[plane] / self._tokens).reshape(self.heads, self.dim)
        return means

    def covariance(self, plane: int) -> Floats:
        means = self._sums[plane] / self._tokens
        covariance: Floats = self._products[plane] / np.float32(self._tokens)
        covariance -= np.outer(means, means).astype(np.float32)
        return covariance

    def roots(self, plane: int, step: float) -> Floats:
        """Of the sensitivities, in units in which an error of `step` is 1; symmetric `[heads, dim, dim]`."""
        values, vectors = np.linalg.eigh(self._fisher[plane] / self._judged)
        values = np.maximum(values, np.maximum(values[:, -1:] * _LEAST, 1e-12))
        roots = (vectors * np.sqrt(values)[:, None]) @ vectors.transpose(0, 2, 1) / step
        rounded: Floats = roots.astype("<f2").astype(np.float32)
        return rounded


def learn(
    statistics: Statistics, samples: Sequence[Array], design: Design = Design(), report: Report | None = None
) -> TransformProfile:
    """The transform; `samples`, texts that are not in `statistics`, tell how coefficients are distributed."""
    made = []
    for plane in range(statistics.planes):
        made.append(_basis(statistics, plane, design))
        if report:
            report(plane + 1, statistics.planes + 1)
    coefficients = []
    for sample in samples:
        planes = zip(made, statistics.by_plane(sample), strict=True)
        coefficients.append([_weigh(statistics, basis, values) for basis, values in planes])
    cells = [_cells(made, weighted, design) for weighted in coefficients]
    renditions = [np.concatenate(texts) for texts in zip(*cells, strict=True)]
    coarser = [np.zeros_like(renditions[0]), *renditions[:-1]]
    firsts = tuple(_first(fine, coarse) for fine, coarse in zip(renditions, coarser, strict=True))
    refinements = tuple(map(_refinement, renditions[:-1], renditions[1:]))
    missing = [_missing(made, weighted, finest[-1]) for weighted, finest in zip(coefficients, cells, strict=True)]
    detail = _detail(np.concatenate(missing, axis=2), design.detail, statistics.layers)
    if report:
        report(statistics.planes + 1, statistics.planes + 1)
    return TransformProfile(statistics.rotary, tuple(made), _reach(made, design), firsts, refinements, detail)


def _basis(statistics: Statistics, plane: int, design: Design) -> bases.Basis:
    heads, dim = statistics.heads, statistics.dim
    roots = statistics.roots(plane, design.step)
    rows = (roots @ statistics.covariance(plane).reshape(heads, dim, -1)).reshape(heads * dim, heads, dim)
    weighted = (rows.transpose(1, 0, 2) @ roots).transpose(1, 0, 2).reshape(heads * dim, heads * dim)
    counts = [max(1, round(share * heads * dim)) for share in design.shares[plane]]
    _, vectors = np.linalg.eigh((weighted + weighted.T) / 2)
    components = np.ascontiguousarray(vectors[:, ::-1][:, : sum(counts)].T)
    return bases.make(statistics.means(plane), roots, components, counts)


def _weigh(statistics: Statistics, basis: bases.Basis, values: Floats) -> Floats:
    by_layer = values.reshape(len(values), statistics.layers, -1, statistics.dim).transpose(1, 0, 2, 3)
    return basis.weigh(by_layer)


def _cells(made: Sequence[bases.Basis], weighted: Sequence[Floats], design: Design) -> list[Array]:
    projected = [basis.project(plane) for basis, plane in zip(made, weighted, strict=True)]
    renditions = embedded.quantise(np.concatenate(projected, axis=1), 1.0, len(design.reach))
    ends = np.cumsum([basis.rank for basis in made])
    for cells, reached in zip(renditions, _reach(made, design), strict=True):
        for basis, end, count in zip(made, ends, reached, strict=True):
            cells[:, end - basis.rank + count : end] = 0
    return renditions


def _reach(made: Sequence[bases.Basis], design: Design) -> Array:
    """How many components of each plane each rendition has."""
    shares = np.outer(design.reach, [basis.rank for basis in made])
    reach: Array = np.maximum(np.rint(shares), 1).astype("<u2")
    return reach


def _missing(made: Sequence[bases.Basis], weighted: Sequence[Floats], cells: Array) -> Floats:
    """What the finest rendition leaves: `[planes, layers * heads * dim, tokens]`."""
    planes = np.split(embedded.dequantise(cells, 1.0), np.cumsum([basis.rank for basis in made])[:-1], axis=1)
    rest = [values - basis.expand(plane) for basis, values, plane in zip(made, weighted, planes, strict=True)]
    return np.stack([values.T for values in rest])


def _first(cells: Array, coarse: Array) -> First:
    """Of the columns that the coarser rendition had not; what it had is coded otherwise."""
    zero = FIRST_SYMBOLS // 2
    cells = np.where(coarse.any(axis=0), 0, cells)
    symbols = np.where(np.abs(cells) < zero, cells + zero, 0)
    members, weights = cluster(_histograms(symbols, FIRST_SYMBOLS), min(CLASSES, cells.shape[1]))
    return First(members.astype("<u2"), rans.Tables(rans.quantise(weights)))


def _refinement(coarse: Array, fine: Array) -> Refinement:
    """Components whose cells 0 split alike share their tables."""
    fresh = np.where((coarse == 0) & (np.abs(fine) <= 1), fine + 1, embedded.SYMBOLS)
    bits = np.where(np.abs(coarse) > 1, np.abs(fine) - 2 * np.abs(coarse) + 1, embedded.SYMBOLS)
    counts = [_histograms(symbols, embedded.SYMBOLS + 1)[:, :-1] for symbols in (fresh, bits)]
    share = (counts[0][:, 1] + 1) / (counts[0].sum(axis=1) + 2)
    classes = min(REFINEMENT_CLASSES, len(share))
    members = np.empty(len(share), np.int64)
    members[np.argsort(share, kind="stable")] = np.arange(len(share)) * classes // len(share)
    weights = np.zeros((classes, CONTEXTS, embedded.SYMBOLS))
    for context, rows in enumerate(counts):
        np.add.at(weights[:, context], members, rows)
    weights[:, 0] += _PRIOR
    weights[:, 1, :-1] += 1
    tables = rans.Tables(rans.quantise(weights.reshape(-1, embedded.SYMBOLS)))
    return Refinement(members.astype("<u2"), tables)


def _detail(missing: Floats, step: float, layers: int) -> Quantiser:
    planes, width, _ = missing.shape
    zero = DETAIL_SYMBOLS // 2
    levels = np.rint(missing.reshape(planes * width, -1) / step).astype(np.int32)
    symbols = np.where(np.abs(levels) < zero, levels + zero, 0).T
    members, weights = cluster(_histograms(symbols, DETAIL_SYMBOLS), min(CLASSES, planes * width))
    classes = members.reshape(planes, layers, -1).transpose(1, 0, 2).reshape(layers * planes, -1)
    zeros = np.zeros(classes.shape, np.float32)
    steps = np.full(len(classes), step, np.float32)
    return Quantiser(zeros, steps, np.ascontiguousarray(classes).astype("<u2"), rans.Tables(rans.quantise(weights)))


def _histograms(symbols: Array, count: int) -> Array:
    """How often each column of `symbols` `[rows, columns]` has each: float64 `[columns, count]`."""
    columns = symbols.shape[1]
    flat = (symbols + np.arange(columns) * count).ravel()
    return np.bincount(flat, minlength=columns * count).reshape(columns, count).astype(np.float64)
