"""The inner loop of `rotary`. It trusts its arguments. Importing this imports numba."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from kvmesh.kv.codecs.compiled import compiled

Array = npt.NDArray[Any]


@compiled
def turn(keys: Array, cos: Array, sin: Array, of_layer: Array, start: int) -> None:
    """Turns the pairs of `keys` `[layers, tokens, heads, dim]` in place."""
    layers, tokens, heads, _ = keys.shape
    pairs = cos.shape[2]
    for layer in range(layers):
        kind = of_layer[layer]
        for token in range(tokens):
            c, s = cos[kind, token], sin[kind, token]
            for head in range(heads):
                first = keys[layer, token, head, start : start + pairs]
                second = keys[layer, token, head, start + pairs : start + 2 * pairs]
                for i in range(pairs):
                    a, b = first[i], second[i]
                    first[i] = a * c[i] - b * s[i]
                    second[i] = b * c[i] + a * s[i]
