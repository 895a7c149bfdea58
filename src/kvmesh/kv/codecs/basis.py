"""A linear transform of one plane's KV: weighted by what errors cost, then onto principal components.

Each head of each layer is multiplied by a symmetric root of its sensitivity, so that equal errors cost equally in all
of them; then all layers and heads of a token are projected onto one orthonormal basis, for a token's KV is many
readings of one residual stream (KVTC, arXiv 2511.01815). A basis is large: components are kept in 8 bits where most
of the energy is, then in 4, and in 2 in the long tail. They are made orthonormal again as they are read, so that
rounding costs no precision, only a little of the energy that they catch. Knows no entropy coder and no rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codecs import packing
from kvmesh.kv.codecs.floats import Floats
from kvmesh.kv.codecs.packing import BITS
from kvmesh.kv.codecs.reader import Reader

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Basis:
    """`means` float16 `[heads, dim]`, `roots` float16 `[heads, dim, dim]`, with the heads of all layers.

    `packed`: the components, as `packing` holds them.

    Raises:
        ValueError: shapes that do not fit, or a transform that cannot be undone.
    """

    means: Array
    roots: Array
    packed: tuple[Array, ...]

    def __post_init__(self) -> None:
        heads, dim = self.means.shape
        if self.roots.shape != (heads, dim, dim) or not 0 < self.rank <= heads * dim or heads * dim % 4:
            raise ValueError(f"{self.rank} components of {heads} heads of {dim}")
        if not all(np.isfinite(array.astype(np.float32)).all() for array in (self.means, self.roots)):
            raise ValueError("a basis is not finite")

    @property
    def rank(self) -> int:
        return sum(map(len, self.packed))

    @cached_property
    def components(self) -> Floats:
        """Orthonormal, float32 `[rank, heads * dim]`; raises ValueError if they do not span as much."""
        rows = packing.unpack(self.packed)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        try:
            lower = np.linalg.cholesky((rows @ rows.T).astype(np.float64))
            orthonormal: Floats = np.linalg.inv(lower).astype(np.float32) @ rows
        except np.linalg.LinAlgError as error:
            raise ValueError("the components of a basis are not independent") from error
        return orthonormal

    @cached_property
    def weights(self) -> tuple[Floats, Floats]:
        """The roots and their inverses."""
        roots = self.roots.astype(np.float64)
        try:
            inverses = np.linalg.inv(roots)
        except np.linalg.LinAlgError as error:
            raise ValueError("a root of a basis has no inverse") from error
        if not np.abs(inverses).max() < 1e6:
            raise ValueError("a root of a basis has no usable inverse")
        return roots.astype(np.float32), inverses.astype(np.float32)

    def ready(self) -> None:
        """Computes what the others need; raises ValueError if it cannot be."""
        _ = self.components, self.weights

    def weigh(self, values: Floats) -> Floats:
        """`values` `[layers, tokens, heads, dim]` to float32 `[tokens, layers * heads * dim]`, errors of equal cost."""
        layers, tokens, heads, dim = values.shape
        centred = values - self.means.astype(np.float32).reshape(layers, 1, heads, dim)
        by_head = centred.transpose(0, 2, 1, 3).reshape(layers * heads, tokens, dim)
        weighted = np.empty((tokens, layers * heads, dim), np.float32)
        np.matmul(by_head, self.weights[0], out=weighted.transpose(1, 0, 2))
        return weighted.reshape(tokens, layers * heads * dim)

    def unweigh(self, weighted: Floats, layers: int) -> Floats:
        """The inverse: `[layers, tokens, heads, dim]`."""
        tokens, (heads, dim) = len(weighted), self.means.shape
        by_head = weighted.reshape(tokens, heads, dim).transpose(1, 0, 2)
        values = np.matmul(by_head, self.weights[1]).reshape(layers, heads // layers, tokens, dim).transpose(0, 2, 1, 3)
        shifted: Floats = values + self.means.astype(np.float32).reshape(layers, 1, heads // layers, dim)
        return shifted

    def project(self, weighted: Floats, count: int | None = None) -> Floats:
        """Coefficients `[tokens, rank]`, or the first `count` of them."""
        return weighted @ self.components[:count].T

    def expand(self, coefficients: Floats) -> Floats:
        """`[tokens, heads * dim]` from the first coefficients; after the last that is not zero they cost nothing."""
        used = used_columns(coefficients)
        return coefficients[:, :used] @ self.components[:used]

    def pack(self) -> bytes:
        upper = self.roots[:, *np.triu_indices(self.roots.shape[1])]
        arrays = (np.array([len(codes) for codes in self.packed], "<u2"), self.means, upper, *self.packed)
        return b"".join(array.tobytes() for array in arrays)


def used_columns(matrix: Array) -> int:
    """Columns up to the last one that is not zero."""
    used = np.flatnonzero(matrix.any(axis=0))
    return int(used[-1]) + 1 if len(used) else 0


def make(means: Array, roots: Array, components: Array, counts: Sequence[int]) -> Basis:
    """Of real `components` `[rank, heads * dim]`, `counts[0]` of them in 8 bits and so on, largest first."""
    packed = packing.pack(np.split(components, np.cumsum(counts)[:-1]))
    return Basis(np.clip(means, -65504, 65504).astype("<f2"), roots.astype("<f2"), packed)


def read(reader: Reader, heads: int, dim: int) -> Basis:
    """What `Basis.pack` wrote; raises ValueError."""
    counts = reader.array("<u2", len(BITS)).tolist()
    means = reader.array("<f2", heads, dim)
    rows, columns = np.triu_indices(dim)
    upper = reader.array("<f2", heads, len(rows))
    roots = np.empty((heads, dim, dim), "<f2")
    roots[:, rows, columns] = upper
    roots[:, columns, rows] = upper
    width = heads * dim
    packed = (reader.array("u1", count, width * bits // 8) for count, bits in zip(counts, BITS, strict=True))
    return Basis(means, roots, tuple(packed))
