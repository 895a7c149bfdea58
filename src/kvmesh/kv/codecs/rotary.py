"""Undoing rotary position embedding (RoFormer, arXiv 2104.09864): keys as they were before their position.

A key turns with its position, which hides how alike keys are. Rotates halves, as the engine does. Knows no codec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codecs.floats import Floats

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Rotary:
    """`frequencies`: radians a position, float32 `[layers, pairs]`; dimensions [start, start + 2 pairs) of a head turn.

    No pairs: nothing turns. The rest of a head, as a latent has it, is left alone.
    """

    frequencies: Floats
    start: int = 0

    @property
    def pairs(self) -> int:
        return int(self.frequencies.shape[1])

    def angles(self, position: int, tokens: int) -> tuple[Floats, Floats, Array]:
        """Cosines and sines `[kinds, tokens, pairs]`, and the kind of each layer."""
        kinds, of_layer = np.unique(self.frequencies, axis=0, return_inverse=True)
        positions = np.arange(position, position + tokens, dtype=np.float64)
        angles = positions[:, None] * kinds.astype(np.float64)[:, None]
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), of_layer.reshape(-1)

    def undo(self, keys: Array, position: int) -> Floats:
        """`keys` `[layers, tokens, heads, dim]`, the first token at `position`, turned back; a copy."""
        return self._turn(keys, position, -1.0)

    def apply(self, keys: Array, position: int) -> Floats:
        """The inverse of `undo`."""
        return self._turn(keys, position, 1.0)

    def _turn(self, keys: Array, position: int, sense: float) -> Floats:
        from kvmesh.kv.codecs import rotary_kernels as kernels

        turned = keys.astype(np.float32, order="C")
        if self.pairs:
            cos, sin, of_layer = self.angles(position, keys.shape[1])
            kernels.turn(turned, cos, np.float32(sense) * sin, of_layer, self.start)
        return turned
