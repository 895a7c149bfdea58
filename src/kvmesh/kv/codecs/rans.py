"""Interleaved rANS: entropy coding of bytes with static distributions (Duda, arXiv 1311.2540; Giesen, 1402.3392).

A matrix `[blocks, rows, columns]` of symbols is coded with one distribution per (block, column), an index into Tables.
Four 32-bit states take turns on four columns and share one string of 16-bit words::

    0   16  states 0..3, uint32 each, as decoding starts
    16  2n  words, uint16, in the order of decoding

All little-endian. Knows no KV and no quantiser. The loops are compiled by numba when first used: `warm_up` where a wait
is welcome, never on an event loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codec import Buffer, CorruptChunk

Array = npt.NDArray[Any]

BITS = 12
TOTAL = 1 << BITS
"""Frequencies of a distribution add up to this."""
STATE_BYTES = 16
OVERRUN = 4
"""Words that a decoder may read beyond the end before it notices."""
MAX_SYMBOLS = 256
MAX_CLASSES = 1024

_LOW = 1 << 16


@dataclass(frozen=True, eq=False)
class Tables:
    """`frequencies` uint16 `[classes, symbols]`, each row summing to TOTAL; a symbol of frequency 0 cannot occur.

    Raises:
        ValueError: they are not.
    """

    frequencies: Array

    def __post_init__(self) -> None:
        frequencies = self.frequencies
        if frequencies.ndim != 2 or frequencies.dtype != np.dtype("<u2"):
            raise ValueError("frequencies are not a uint16 matrix")
        if not (1 <= len(frequencies) <= MAX_CLASSES and 1 <= frequencies.shape[1] <= MAX_SYMBOLS):
            raise ValueError(f"{frequencies.shape} are not classes and symbols")
        if (frequencies.sum(axis=1, dtype=np.int64) != TOTAL).any():
            raise ValueError(f"a distribution does not sum to {TOTAL}")

    @property
    def classes(self) -> int:
        return len(self.frequencies)

    @property
    def symbols(self) -> int:
        return int(self.frequencies.shape[1])

    @property
    def bits(self) -> Array:
        """What each symbol costs, float64 `[classes, symbols]`; infinite for one that cannot occur."""
        with np.errstate(divide="ignore"):
            return BITS - np.log2(self.frequencies)

    @cached_property
    def encoding(self) -> Array:
        """float64 `[classes, symbols, 3]`: frequency, start of its slots, reciprocal."""
        frequencies = self.frequencies.astype(np.float64)
        starts = np.cumsum(frequencies, axis=1) - frequencies
        return np.stack([frequencies, starts, 1 / np.maximum(frequencies, 1)], axis=2)

    @cached_property
    def decoding(self) -> Array:
        """uint32 `[classes, TOTAL]`: for each slot symbol | offset in the symbol's slots << 8 | frequency - 1 << 20."""
        table = np.empty((self.classes, TOTAL), np.uint32)
        for row, frequencies in zip(table, self.frequencies.astype(np.uint32), strict=True):
            symbol = np.repeat(np.arange(self.symbols, dtype=np.uint32), frequencies)
            start = np.cumsum(frequencies, dtype=np.uint32) - frequencies
            offset = np.arange(TOTAL, dtype=np.uint32) - start[symbol]
            row[:] = symbol | offset << 8 | (frequencies[symbol] - 1) << 20
        return table


def quantise(weights: Array) -> Array:
    """Frequencies `[classes, symbols]` for Tables: largest remainders of non-negative weights, none all zero.

    A symbol of some weight, however small, keeps at least one slot.
    """
    weights = np.asarray(weights, np.float64)
    possible = weights > 0
    exact = weights / weights.sum(axis=1, keepdims=True) * (TOTAL - possible.sum(axis=1, keepdims=True))
    slots = np.floor(exact).astype(np.int64) + possible
    for row, remainder in zip(slots, np.where(possible, exact - np.floor(exact), -1.0), strict=True):
        missing = TOTAL - int(row.sum())
        row[np.argsort(-remainder, kind="stable")[:missing]] += 1
    frequencies: Array = slots.astype("<u2")
    return frequencies


def encode(symbols: Array, classes: Array, tables: Tables) -> bytes:
    """The coded uint8 `symbols` `[blocks, rows, columns]`; `classes` uint16 `[blocks, columns]`.

    Raises:
        ValueError: a symbol that cannot occur, a class beyond the tables, or shapes that do not fit each other.
    """
    from kvmesh.kv.codecs import rans_kernels as kernels

    _check(symbols.shape, classes, tables)
    if symbols.dtype != np.uint8 or (symbols.size and symbols.max() >= tables.symbols):
        raise ValueError(f"symbols are not bytes below {tables.symbols}")
    words, states = np.empty(symbols.size + 4, "<u2"), np.empty(4, "<u4")
    start = kernels.encode(np.ascontiguousarray(symbols), classes, tables.encoding, words, states)
    if start < 0:
        raise ValueError("a symbol cannot occur in its class")
    return states.tobytes() + words[start:].tobytes()


def decode(payload: Buffer, shape: tuple[int, int, int], classes: Array, tables: Tables) -> Array:
    """The symbols, uint8 of `shape`, which the caller has bounded.

    Raises:
        CorruptChunk: the payload is not exactly such symbols.
    """
    from kvmesh.kv.codecs import rans_kernels as kernels

    _check(shape, classes, tables)
    states, words = split(payload)
    symbols = np.empty(shape, np.uint8)
    if not kernels.decode(words, len(words) - OVERRUN, states, classes, tables.decoding, symbols):
        raise CorruptChunk("the rANS string does not end where its symbols do")
    return symbols


def split(payload: Buffer) -> tuple[Array, Array]:
    """States and words of a string, with OVERRUN words of 0 behind them; raises CorruptChunk."""
    size = len(payload) - STATE_BYTES
    if size < 0 or size % 2:
        raise CorruptChunk(f"{len(payload)} bytes are not a rANS string")
    states = np.frombuffer(payload, "<u4", 4)
    if (states < _LOW).any():
        raise CorruptChunk("a rANS state is out of range")
    words = np.zeros(size // 2 + OVERRUN, "<u2")
    words[:-OVERRUN] = np.frombuffer(payload, "<u2", offset=STATE_BYTES)
    return states, words


def _check(shape: tuple[int, ...], classes: Array, tables: Tables) -> None:
    if len(shape) != 3 or classes.shape != (shape[0], shape[2]) or classes.dtype != np.dtype("<u2"):
        raise ValueError(f"classes {classes.dtype} {classes.shape} do not fit symbols {shape}")
    if classes.size and classes.max() >= tables.classes:
        raise ValueError(f"a class is beyond the {tables.classes} of the tables")
