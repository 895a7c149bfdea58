"""The inner loops of `rans`. They trust their arguments: `rans` has checked them.

Four states in turn hide each other's latency; symbols of one column follow each other, so that four tables of 16 KiB
are hot at a time. Importing this imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codecs.compiled import compiled

Array = npt.NDArray[Any]
Int = Any
"""int64 once compiled."""

BITS = 12
LOW = 1 << 16
"""States live in [LOW, LOW << 16)."""


@compiled
def _push(x: Int, symbol: Int, table: Array, words: Array, p: Int) -> tuple[Int, Int]:
    """Puts a symbol on state `x`; words are written downwards from `p`."""
    frequency = np.int64(table[symbol, 0])
    if frequency == 0 or x < 0:
        return np.int64(-1), p
    if x >= frequency << 20:
        p -= 1
        words[p] = x & 0xFFFF
        x >>= 16
    # Exact: (x + 1/2) / frequency stays further from integers than a double errs for x below 2^32.
    quotient = np.int64((x + 0.5) * table[symbol, 2])
    return (quotient << BITS) + x - quotient * frequency + np.int64(table[symbol, 1]), p


@compiled
def _pull(x: Int, entry: Int, words: Array, p: Int) -> tuple[Int, Int]:
    """The state without its symbol; `entry` packs symbol (8 bits), slot - start (12) and frequency - 1 (12)."""
    x = ((entry >> 20) + 1) * (x >> BITS) + ((entry >> 8) & 4095)
    low = x < LOW
    refilled = (x << 16) | np.int64(words[p])
    return (refilled if low else x), p + low


@compiled
def encode(symbols: Array, classes: Array, tables: Array, words: Array, states: Array) -> Int:
    """Fills `words` from its end and `states`; returns where the words begin. The reverse of `decode`'s order.

    Negative: a symbol has frequency 0. Each symbol takes one word at most, so `words` cannot run out.
    """
    blocks, rows, columns = symbols.shape
    quads = columns // 4 * 4
    start: Int = np.int64(LOW)
    x0 = x1 = x2 = x3 = start
    p: Int = np.int64(len(words))
    for b in range(blocks - 1, -1, -1):
        for c in range(columns - 1, quads - 1, -1):
            table = tables[classes[b, c]]
            for r in range(rows - 1, -1, -1):
                x0, p = _push(x0, symbols[b, r, c], table, words, p)
        for c in range(quads - 4, -1, -4):
            t0, t1 = tables[classes[b, c]], tables[classes[b, c + 1]]
            t2, t3 = tables[classes[b, c + 2]], tables[classes[b, c + 3]]
            for r in range(rows - 1, -1, -1):
                x3, p = _push(x3, symbols[b, r, c + 3], t3, words, p)
                x2, p = _push(x2, symbols[b, r, c + 2], t2, words, p)
                x1, p = _push(x1, symbols[b, r, c + 1], t1, words, p)
                x0, p = _push(x0, symbols[b, r, c], t0, words, p)
    if min(x0, x1, x2, x3) < 0:
        return np.int64(-1)
    states[0], states[1], states[2], states[3] = x0, x1, x2, x3
    return p


@compiled
def decode(words: Array, count: Int, states: Array, classes: Array, tables: Array, symbols: Array) -> bool:
    """Fills `symbols`; True if exactly `count` words were used and every state is back where encoding began.

    `words` has four more than `count`: a quad may overrun before that is noticed.
    """
    blocks, rows, columns = symbols.shape
    quads = columns // 4 * 4
    x0: Int = np.int64(states[0])
    x1: Int = np.int64(states[1])
    x2: Int = np.int64(states[2])
    x3: Int = np.int64(states[3])
    p: Int = np.int64(0)
    for b in range(blocks):
        for c in range(0, quads, 4):
            t0, t1 = tables[classes[b, c]], tables[classes[b, c + 1]]
            t2, t3 = tables[classes[b, c + 2]], tables[classes[b, c + 3]]
            for r in range(rows):
                e0, e1 = np.int64(t0[x0 & 4095]), np.int64(t1[x1 & 4095])
                e2, e3 = np.int64(t2[x2 & 4095]), np.int64(t3[x3 & 4095])
                symbols[b, r, c] = e0 & 255
                symbols[b, r, c + 1] = e1 & 255
                symbols[b, r, c + 2] = e2 & 255
                symbols[b, r, c + 3] = e3 & 255
                x0, p = _pull(x0, e0, words, p)
                x1, p = _pull(x1, e1, words, p)
                x2, p = _pull(x2, e2, words, p)
                x3, p = _pull(x3, e3, words, p)
                if p > count:
                    return False
        for c in range(quads, columns):
            table = tables[classes[b, c]]
            for r in range(rows):
                entry = np.int64(table[x0 & 4095])
                symbols[b, r, c] = entry & 255
                x0, p = _pull(x0, entry, words, p)
                if p > count:
                    return False
    return bool(p == count and x0 == LOW and x1 == LOW and x2 == LOW and x3 == LOW)
