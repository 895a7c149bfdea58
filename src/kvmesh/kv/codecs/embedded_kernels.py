"""The inner loops of `embedded`. They trust their arguments. Importing this imports numba."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codecs.compiled import compiled
from kvmesh.kv.codecs.rans_kernels import LOW, _pull, _push

Array = npt.NDArray[Any]
Int = Any
"""int64 once compiled."""


@compiled
def quantise(values: Array, scale: Any, largest: Int, cells: Array) -> None:
    rows, columns = values.shape
    for r in range(rows):
        row, out = values[r], cells[r]
        for c in range(columns):
            x = min(abs(row[c]) * scale, np.float32(largest))
            cell = min(np.int32(x) + np.int32(1), np.int32(largest))
            cell = cell if x >= np.float32(0.5) else np.int32(0)
            out[c] = -cell if row[c] < 0 else cell


@compiled
def parents(cells: Array, coarse: Array) -> None:
    rows, columns = cells.shape
    for r in range(rows):
        row, out = cells[r], coarse[r]
        for c in range(columns):
            m = abs(row[c])
            parent = (m + np.int32(1)) >> np.int32(1) if m > 1 else np.int32(0)
            out[c] = -parent if row[c] < 0 else parent


@compiled
def symbols(cells: Array, classes: Array, possible: Array, coded: Array) -> int:
    """Fills `coded` with cell + zero, or 0 where that is not possible; returns how many are 0."""
    rows, columns = cells.shape
    count, zero = possible.shape[1], possible.shape[1] // 2
    escapes = 0
    for r in range(rows):
        row, out = cells[r], coded[r]
        for c in range(columns):
            symbol = row[c] + zero
            inside = 0 < symbol < count and possible[classes[c], symbol]
            out[c] = symbol if inside else 0
            escapes += 0 if inside else 1
    return escapes


@compiled
def dequantise(cells: Array, step: Any, values: Array) -> None:
    rows, columns = cells.shape
    for r in range(rows):
        row, out = cells[r], values[r]
        for c in range(columns):
            m = abs(row[c])
            x = (np.float32(m) - np.float32(0.5)) * step
            x = np.float32(0) if m == 0 else (np.float32(0.75) * step if m == 1 else x)
            out[c] = -x if row[c] < 0 else x


@compiled
def _refine(x: Int, p: Int, coarse: Int, fine: Int, table: Array, words: Array) -> tuple[Int, Int]:
    """Puts on state `x` what makes `fine` of `coarse`; `table` `[2 * 3 symbols, 3]` is that of the column."""
    if coarse == 0:
        return _push(x, fine + 1, table, words, p)
    if abs(coarse) > 1:
        return _push(x, 3 + abs(fine) - 2 * abs(coarse) + 1, table, words, p)
    return x, p


@compiled
def encode(coarse: Array, fine: Array, classes: Array, tables: Array, words: Array, states: Array) -> Int:
    """Fills `words` from its end and `states`; returns where the words begin. The reverse of `decode`'s order."""
    rows, columns = fine.shape
    quads = columns // 4 * 4
    start: Int = np.int64(LOW)
    x0 = x1 = x2 = x3 = start
    p: Int = np.int64(len(words))
    for c in range(columns - 1, quads - 1, -1):
        t = tables[classes[c]]
        for r in range(rows - 1, -1, -1):
            x0, p = _refine(x0, p, coarse[r, c], fine[r, c], t, words)
    for c in range(quads - 4, -1, -4):
        t0, t1 = tables[classes[c]], tables[classes[c + 1]]
        t2, t3 = tables[classes[c + 2]], tables[classes[c + 3]]
        for r in range(rows - 1, -1, -1):
            x3, p = _refine(x3, p, coarse[r, c + 3], fine[r, c + 3], t3, words)
            x2, p = _refine(x2, p, coarse[r, c + 2], fine[r, c + 2], t2, words)
            x1, p = _refine(x1, p, coarse[r, c + 1], fine[r, c + 1], t1, words)
            x0, p = _refine(x0, p, coarse[r, c], fine[r, c], t0, words)
    states[0], states[1], states[2], states[3] = x0, x1, x2, x3
    return p


@compiled
def _child(x: Int, p: Int, coarse: Int, table: Array, words: Array) -> tuple[Int, Int, Int]:
    """State, place and the finer cell; `table` `[2, slots]` is that of the column."""
    m = abs(coarse)
    if m == 1:
        return x, p, np.int64(2 * coarse)
    entry = np.int64(table[0 if m == 0 else 1, x & 4095])
    x, p = _pull(x, entry, words, p)
    symbol = entry & 255
    if m == 0:
        return x, p, symbol - 1
    m = 2 * m - 1 + symbol
    return x, p, (m if coarse > 0 else -m)


@compiled
def decode(words: Array, count: Int, states: Array, classes: Array, tables: Array, coarse: Array, fine: Array) -> bool:
    """Fills `fine`; True if exactly `count` words were used and every state is back where encoding began.

    `words` has four more than `count`: a quad may overrun before that is noticed.
    """
    rows, columns = fine.shape
    quads = columns // 4 * 4
    x0: Int = np.int64(states[0])
    x1: Int = np.int64(states[1])
    x2: Int = np.int64(states[2])
    x3: Int = np.int64(states[3])
    p: Int = np.int64(0)
    for c in range(0, quads, 4):
        k0, k1, k2, k3 = 2 * classes[c], 2 * classes[c + 1], 2 * classes[c + 2], 2 * classes[c + 3]
        t0, t1, t2, t3 = tables[k0 : k0 + 2], tables[k1 : k1 + 2], tables[k2 : k2 + 2], tables[k3 : k3 + 2]
        for r in range(rows):
            x0, p, fine[r, c] = _child(x0, p, coarse[r, c], t0, words)
            x1, p, fine[r, c + 1] = _child(x1, p, coarse[r, c + 1], t1, words)
            x2, p, fine[r, c + 2] = _child(x2, p, coarse[r, c + 2], t2, words)
            x3, p, fine[r, c + 3] = _child(x3, p, coarse[r, c + 3], t3, words)
            if p > count:
                return False
    for c in range(quads, columns):
        t = tables[2 * classes[c] : 2 * classes[c] + 2]
        for r in range(rows):
            x0, p, fine[r, c] = _child(x0, p, coarse[r, c], t, words)
            if p > count:
                return False
    return bool(p == count and x0 == LOW and x1 == LOW and x2 == LOW and x3 == LOW)
