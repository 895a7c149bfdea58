"""`codecs.quantiser` with its values on a device: the same bytes, and the same values, bit by bit.

Every product and sum is rounded for itself, as on the CPU: no operation here fuses two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.kv.codec import Buffer
from kvmesh.kv.codecs.quantiser import LARGEST, Quantiser
from kvmesh.kv.cuda.device import Device


class DeviceQuantiser:
    def __init__(self, quantiser: Quantiser, device: Device) -> None:
        self._quantiser, self._device = quantiser, device
        lows, highs = quantiser.levels
        self._lows, self._highs = device.up(lows)[:, None], device.up(highs)[:, None]
        self._means = device.up(quantiser.means)[:, None]
        self._steps, self._scales = (device.up(each)[:, None, None] for each in (quantiser.steps, quantiser.scales))

    def encode(self, values: Tensor) -> bytes:
        """The coded `values` `[blocks, rows, columns]`, finite."""
        centred = values - self._means
        levels = torch.round(centred * self._scales)
        outside = (levels < self._lows) | (levels > self._highs)
        symbols = torch.where(outside, 0, levels + self._quantiser.zero).to(torch.uint8)
        escapes = torch.round(centred[outside] / self._steps.expand_as(centred)[outside]).clamp(-LARGEST, LARGEST)
        return self._quantiser.write(symbols.cpu().numpy(), escapes.cpu().numpy())

    def decode(self, payload: Buffer, rows: int) -> Tensor:
        """`[blocks, rows, columns]`, which the caller has bounded; raises CorruptChunk."""
        symbols, escapes = self._quantiser.read(payload, rows)
        coded = self._device.up(symbols)
        levels = coded.float() - self._quantiser.zero
        if len(escapes):
            levels[coded == 0] = self._device.up(escapes)
        return levels * self._steps + self._means
