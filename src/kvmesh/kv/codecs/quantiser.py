"""A matrix of KV as entropy-coded integers: uniform steps, static distributions, an escape for what they do not cover.

    0   4   n, the number of escapes
    4   2n  their levels, int16, in the order of the matrix
        …   the symbols, a string of `rans`; symbol 0 is the escape, others are level + zero

Knows no layers and no profile file: a Quantiser is given its steps and tables.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codec import Buffer, CorruptChunk
from kvmesh.kv.codecs import rans
from kvmesh.kv.codecs.floats import Floats

Array = npt.NDArray[Any]

LARGEST = 32767
"""Of the levels of escapes."""

_COUNT = struct.Struct("<I")
_LEVEL = np.dtype("<i2")


@dataclass(frozen=True, eq=False)
class Quantiser:
    """`means` float32 `[blocks, columns]`, `steps` float32 `[blocks]`, `classes` uint16 `[blocks, columns]`.

    Raises:
        ValueError: shapes that do not fit, steps that are not positive, or tables that cannot be used.
    """

    means: Floats
    steps: Floats
    classes: Array
    tables: rans.Tables

    def __post_init__(self) -> None:
        frequencies = self.tables.frequencies
        if self.means.shape != self.classes.shape or self.steps.shape != self.means.shape[:1]:
            raise ValueError("means, steps and classes are of different shapes")
        if not (np.isfinite(self.means).all() and np.isfinite(self.steps).all() and (self.steps > 1e-30).all()):
            raise ValueError("a mean or step is not usable")
        if self.tables.symbols < 4 or self.tables.symbols % 2:
            raise ValueError(f"{self.tables.symbols} symbols are not usable")
        if self.classes.max() >= self.tables.classes or (frequencies[:, 0] == 0).any():
            raise ValueError("a class does not exist, or has no escape")
        first, last = self._range
        if ((frequencies[:, 1:] > 0).sum(axis=1) != last - first + 1).any():
            raise ValueError("the symbols of a class have gaps")

    @property
    def zero(self) -> int:
        """The symbol of level 0."""
        return self.tables.symbols // 2

    @cached_property
    def _range(self) -> tuple[Array, Array]:
        """First and last symbol of each class beside the escape; none: 1 and 0."""
        usable = self.tables.frequencies[:, 1:] > 0
        first = np.argmax(usable, axis=1) + 1
        last = self.tables.symbols - 1 - np.argmax(usable[:, ::-1], axis=1)
        none = ~usable.any(axis=1)
        return np.where(none, 1, first), np.where(none, 0, last)

    @cached_property
    def scales(self) -> Floats:
        """Levels for each unit of a value."""
        return (1 / self.steps).astype(np.float32)

    @cached_property
    def levels(self) -> tuple[Floats, Floats]:
        """Lowest and highest level of each (block, column)."""
        first, last = ((symbol - self.zero).astype(np.float32)[self.classes] for symbol in self._range)
        return first, last

    def slice(self, start: int, stop: int) -> Quantiser:
        """That of some of the blocks."""
        blocks = slice(start, stop)
        return Quantiser(self.means[blocks], self.steps[blocks], self.classes[blocks], self.tables)

    def encode(self, values: Floats) -> bytes:
        """The coded `values` `[blocks, rows, columns]`, contiguous and finite."""
        from kvmesh.kv.codecs import quantiser_kernels as kernels

        symbols = np.empty(values.shape, np.uint8)
        lows, highs = self.levels
        count = kernels.quantise(values, self.means, self.scales, lows, highs, self.zero, symbols)
        return self.write(symbols, self._escaped(values, symbols) if count else np.empty(0, _LEVEL))

    def write(self, symbols: Array, escapes: Array) -> bytes:
        """The coded uint8 `symbols` and the levels of those that are escapes, within ±LARGEST, in their order."""
        coded = rans.encode(symbols, self.classes, self.tables)
        return _COUNT.pack(len(escapes)) + escapes.astype(_LEVEL).tobytes() + coded

    def read(self, payload: Buffer, rows: int) -> tuple[Array, Floats]:
        """What `write` was given, as many escapes as there should be; raises CorruptChunk."""
        count, escapes, coded = _split(memoryview(payload))
        blocks, columns = self.means.shape
        symbols = rans.decode(coded, (blocks, rows, columns), self.classes, self.tables)
        due = symbols.size - int(np.count_nonzero(symbols))
        if due != count:
            raise CorruptChunk(f"{count} escapes where {due} are due")
        return symbols, escapes

    def decode(self, payload: Buffer, rows: int) -> Floats:
        """`[blocks, rows, columns]`, which the caller has bounded; raises CorruptChunk."""
        from kvmesh.kv.codecs import quantiser_kernels as kernels

        symbols, escapes = self.read(payload, rows)
        values = np.empty(symbols.shape, np.float32)
        kernels.dequantise(symbols, self.means, self.steps, self.zero, values)
        if len(escapes):
            where = np.nonzero(symbols == 0)
            values[where] = escapes * self.steps[where[0]] + self.means[where[0], where[2]]
        return values

    def _escaped(self, values: Floats, symbols: Array) -> Array:
        where = np.nonzero(symbols == 0)
        levels = np.rint((values[where] - self.means[where[0], where[2]]) / self.steps[where[0]])
        clipped: Array = np.clip(levels, -LARGEST, LARGEST)
        return clipped


def _split(payload: memoryview) -> tuple[int, Array, memoryview]:
    if len(payload) < _COUNT.size:
        raise CorruptChunk("a part without its number of escapes")
    (count,) = _COUNT.unpack_from(payload)
    if len(payload) < _COUNT.size + 2 * count:
        raise CorruptChunk(f"a part shorter than its {count} escapes")
    escapes = np.frombuffer(payload, _LEVEL, count, _COUNT.size).astype(np.float32)
    return count, escapes, payload[_COUNT.size + 2 * count :]
