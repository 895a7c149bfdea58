"""Orthonormal vectors in few bits: 8 for some, 4 for others, 2 for most.

Vectors of a basis are large in a few places; rotated by a fixed rotation, their numbers are spread like a Gaussian's,
and a coarse uniform quantiser keeps 92 % of a vector in 2 bits, 99 % in 4 (QuIP#, arXiv 2402.04396, does so with
weights). A code c of b bits is c - (2^b - 1) / 2, a byte's lowest bits come first, and lengths mean nothing. Knows no
KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codecs.floats import Floats

Array = npt.NDArray[Any]

BITS = (8, 4, 2)
_STEPS = (1 / 32, 0.335, 0.996)
"""In standard deviations: what loses least of a Gaussian."""
_BLOCK = 128
_FACTORS = tuple(map(np.uint64, (2654435761, 2246822519)))


def pack(groups: Sequence[Array]) -> tuple[Array, ...]:
    """Vectors `[count, width]` for each of BITS to uint8 `[count, width * bits / 8]`; `width` is a multiple of 4."""
    return tuple(_pack(_mix(rows), bits, step) for rows, bits, step in zip(groups, BITS, _STEPS, strict=True))


def unpack(packed: Sequence[Array]) -> Floats:
    """The vectors, all of them, float32 `[counts, width]`."""
    return _unmix(np.concatenate([_unpack(codes, bits) for codes, bits in zip(packed, BITS, strict=True)]))


def _mix(rows: Array) -> Array:
    """Rotated, twice: shuffled, signs changed, and Hadamard's transform of what lies side by side."""
    for places, signs, hadamard in _rounds(rows.shape[1]):
        rows = ((rows[:, places] * signs).reshape(-1, len(hadamard)) @ hadamard).reshape(len(rows), -1)
    return rows


def _unmix(rows: Array) -> Array:
    for places, signs, hadamard in _rounds(rows.shape[1])[::-1]:
        turned = (rows.reshape(-1, len(hadamard)) @ hadamard).reshape(len(rows), -1) * signs
        rows = np.empty_like(turned)
        rows[:, places] = turned
    return rows


def _rounds(width: int) -> list[tuple[Array, Array, Floats]]:
    hadamard = np.ones((1, 1), np.float32)
    while width % (2 * len(hadamard)) == 0 and len(hadamard) < _BLOCK:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    hadamard /= np.float32(np.sqrt(len(hadamard)))
    hashes = [(np.arange(1, width + 1, dtype=np.uint64) * factor) % np.uint64(1 << 32) for factor in _FACTORS]
    signs = [np.where(number >> np.uint64(16) & np.uint64(1), 1, -1).astype(np.float32) for number in hashes]
    return [(np.argsort(number), sign, hadamard) for number, sign in zip(hashes, signs, strict=True)]


def _pack(rows: Array, bits: int, step: float) -> Array:
    steps = np.maximum(rows.std(axis=1, keepdims=True) * step, 1e-12)
    middle = 1 << (bits - 1)
    codes = np.clip(np.floor(rows / steps) + middle, 0, 2 * middle - 1).astype(np.uint8)
    each = 8 // bits
    shifted = codes.reshape(len(rows), -1, each) << (np.arange(each, dtype=np.uint8) * bits)
    packed: Array = np.bitwise_or.reduce(shifted, axis=2).astype(np.uint8)
    return packed


def _unpack(packed: Array, bits: int) -> Floats:
    each = 8 // bits
    codes = packed[:, :, None] >> (np.arange(each, dtype=np.uint8) * bits) & ((1 << bits) - 1)
    return codes.reshape(len(packed), packed.shape[1] * each).astype(np.float32) - ((1 << bits) - 1) / 2
