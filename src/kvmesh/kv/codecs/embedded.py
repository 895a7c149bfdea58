"""An embedded quantiser: integers whose halving again and again is the quantisation by steps twice as wide.

With a step s, cell 0 is (-s/2, s/2), cells ±1 end at s, and from there all are s wide: cell m is [(m - 1) s, m s).
Seen with a step of 2s, cells 0 and ±1 lie in 0, ±2 is ±1, and ±(2m - 1) and ±2m are ±m. So a coarse rendition is
refined by one of three where it was 0, by none where it was ±1, by one bit elsewhere, and each step has a cell 0 of
its own width: no dead zone grows, as it does where plain bit planes are sent (JPEG 2000, ISO/IEC 15444-1). It costs 1
to 2 % more than rounding at the same error. A matrix `[rows, columns]` is coded as::

    first       4   n, the number of escapes          refinement   a string of `rans`
                2n  their cells, int16, by rows
                …   a string of `rans`: symbol 0 is the escape, others are cell + symbols / 2

Knows no transform and no profile file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codec import Buffer, CorruptChunk
from kvmesh.kv.codecs import rans
from kvmesh.kv.codecs.floats import Floats

Array = npt.NDArray[Any]

CONTEXTS = 2
"""A refined cell was 0, or beyond ±1."""
SYMBOLS = 3
LARGEST = 32767
"""Of the cells of a first rendition."""

_COUNT = struct.Struct("<I")
_CELL = np.dtype("<i2")


def quantise(values: Floats, step: float, renditions: int) -> list[Array]:
    """The cells of `values` `[rows, columns]`, int32, coarse to fine; `step` is that of the finest."""
    from kvmesh.kv.codecs import embedded_kernels as kernels

    finest = np.empty(values.shape, np.int32)
    kernels.quantise(values, np.float32(1 / step), np.int64(LARGEST << (renditions - 1)), finest)
    return nested(finest, renditions)


def nested(finest: Array, renditions: int) -> list[Array]:
    """Those cells and what they are with wider steps, coarse to fine."""
    cells = [finest]
    for _ in range(renditions - 1):
        cells.append(parents(cells[-1]))
    return cells[::-1]


def dequantise(cells: Array, step: float) -> Floats:
    """The middles of cells."""
    from kvmesh.kv.codecs import embedded_kernels as kernels

    values = np.empty(cells.shape, np.float32)
    kernels.dequantise(cells, np.float32(step), values)
    return values


def parents(cells: Array) -> Array:
    """The cells with a step twice as wide."""
    from kvmesh.kv.codecs import embedded_kernels as kernels

    coarse = np.empty_like(cells)
    kernels.parents(cells, coarse)
    return coarse


@dataclass(frozen=True, eq=False)
class First:
    """Codes a first rendition; `classes` uint16 `[columns]`.

    Raises:
        ValueError: shapes that do not fit, or tables that cannot be used.
    """

    classes: Array
    tables: rans.Tables

    def __post_init__(self) -> None:
        _check(self.classes, self.tables.classes)
        if self.tables.symbols < 4 or self.tables.symbols % 2 or (self.tables.frequencies[:, 0] == 0).any():
            raise ValueError("a class has no escape")

    def encode(self, cells: Array, columns: Array) -> bytes:
        """The coded `cells` `[rows, columns]`, where `columns` says which of all they are."""
        from kvmesh.kv.codecs import embedded_kernels as kernels

        classes, symbols = self.classes[columns], np.empty(cells.shape, np.uint8)
        count = kernels.symbols(cells, classes, self.tables.frequencies > 0, symbols)
        escaped = cells[symbols == 0].astype(_CELL).tobytes() if count else b""
        return b"".join((_COUNT.pack(count), escaped, rans.encode(symbols[None], classes[None], self.tables)))

    def decode(self, payload: Buffer, rows: int, columns: Array) -> Array:
        """int32 `[rows, columns]`, which the caller has bounded; raises CorruptChunk."""
        if len(payload) < _COUNT.size or len(payload) < _COUNT.size + 2 * _COUNT.unpack_from(payload)[0]:
            raise CorruptChunk("a rendition shorter than its escapes")
        (count,) = _COUNT.unpack_from(payload)
        escaped = np.frombuffer(payload, _CELL, count, _COUNT.size)
        coded = memoryview(payload)[_COUNT.size + escaped.nbytes :]
        symbols = rans.decode(coded, (1, rows, len(columns)), self.classes[None, columns], self.tables)[0]
        cells: Array = symbols.astype(np.int32) - self.tables.symbols // 2
        outside = symbols == 0
        if np.count_nonzero(outside) != count:
            raise CorruptChunk(f"{count} escapes are not as many as are due")
        cells[outside] = escaped
        return cells


@dataclass(frozen=True, eq=False)
class Refinement:
    """Codes a rendition given the coarser one; `classes` uint16 `[columns]`, tables for CONTEXTS contexts per class.

    Raises:
        ValueError: shapes that do not fit, or tables that cannot be used.
    """

    classes: Array
    tables: rans.Tables

    def __post_init__(self) -> None:
        frequencies = self.tables.frequencies
        _check(self.classes, self.tables.classes // CONTEXTS)
        if frequencies.shape[1] != SYMBOLS or self.tables.classes % CONTEXTS:
            raise ValueError(f"{frequencies.shape} are not tables of refinements")
        if (frequencies[::CONTEXTS] == 0).any() or (frequencies[1::CONTEXTS, : SYMBOLS - 1] == 0).any():
            raise ValueError("a refinement cannot occur")
        if frequencies[1::CONTEXTS, SYMBOLS - 1 :].any():
            raise ValueError("a bit has three values")

    def encode(self, coarse: Array, fine: Array, columns: Array) -> bytes:
        """What makes `fine` of `coarse`, both int32 `[rows, columns]`."""
        from kvmesh.kv.codecs import embedded_kernels as kernels

        words, states = np.empty(fine.size + 4, "<u2"), np.empty(4, "<u4")
        tables = self.tables.encoding.reshape(-1, CONTEXTS * SYMBOLS, 3)
        start = kernels.encode(coarse, fine, self.classes[columns], tables, words, states)
        return states.tobytes() + words[start:].tobytes()

    def decode(self, payload: Buffer, coarse: Array, columns: Array) -> Array:
        """The finer cells; raises CorruptChunk."""
        from kvmesh.kv.codecs import embedded_kernels as kernels

        states, words = rans.split(payload)
        fine = np.empty(coarse.shape, np.int32)
        classes, count = self.classes[columns], len(words) - rans.OVERRUN
        if not kernels.decode(words, count, states, classes, self.tables.decoding, coarse, fine):
            raise CorruptChunk("the refinement does not end where its cells do")
        return fine


def _check(classes: Array, count: int) -> None:
    if classes.ndim != 1 or classes.dtype != np.dtype("<u2") or (classes.size and classes.max() >= count):
        raise ValueError(f"classes {classes.dtype} {classes.shape} are not of {count} tables")
