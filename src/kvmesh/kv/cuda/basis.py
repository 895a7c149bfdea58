"""`codecs.basis` and `codecs.rotary` with their values on a device: the same but for how sums of products round."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvmesh.kv.codecs.basis import Basis
from kvmesh.kv.codecs.rotary import Rotary
from kvmesh.kv.cuda.device import Device


class DeviceBasis:
    """Shapes are as those of `Basis`."""

    def __init__(self, basis: Basis, device: Device) -> None:
        self._means = device.up(basis.means.astype(np.float32))[:, None]
        self._roots, self._inverses = map(device.up, basis.weights)
        self._components = device.up(basis.components)

    def weigh(self, values: Tensor) -> Tensor:
        """`[layers, tokens, heads, dim]` to `[tokens, layers * heads * dim]`, errors of equal cost."""
        by_head = values.transpose(1, 2).flatten(0, 1) - self._means
        return (by_head @ self._roots).transpose(0, 1).flatten(1)

    def unweigh(self, weighted: Tensor, layers: int) -> Tensor:
        """The inverse."""
        heads, dim, _ = self._inverses.shape
        tokens = len(weighted)
        by_head = weighted.reshape(tokens, heads, dim).transpose(0, 1)
        values = by_head @ self._inverses + self._means
        return values.reshape(layers, heads // layers, tokens, dim).transpose(1, 2)

    def project(self, weighted: Tensor, count: int) -> Tensor:
        """The first `count` coefficients."""
        return weighted @ self._components[:count].T

    def expand(self, coefficients: Tensor) -> Tensor:
        """Weighted values from the first coefficients."""
        return coefficients @ self._components[: coefficients.shape[1]]


def turn(rotary: Rotary, keys: Tensor, position: int, sense: int, device: Device) -> Tensor:
    """`keys` `[layers, tokens, heads, dim]` turned to (1) or back from (-1) their positions; equal bit by bit."""
    if not rotary.pairs:
        return keys
    cosines, sines, of_layer = rotary.angles(position, keys.shape[1])
    cos, sin = device.up(cosines[of_layer])[:, :, None], sense * device.up(sines[of_layer])[:, :, None]
    middle = rotary.start + rotary.pairs
    rest, first, second, latter = keys.tensor_split((rotary.start, middle, middle + rotary.pairs), dim=-1)
    return torch.cat((rest, first * cos - second * sin, second * cos + first * sin, latter), dim=-1)
