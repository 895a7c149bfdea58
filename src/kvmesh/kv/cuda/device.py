"""A torch device as codecs need it: arrays up and KV down, in a queue of its own. Knows no codec."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvmesh.kv.codec import KvArray

Array = npt.NDArray[Any]


class Device:
    """`name`: as torch names it, such as `cuda:1`."""

    def __init__(self, name: str) -> None:
        self._device = torch.device(name)
        self._stream = _stream(self._device) if self._device.type == "cuda" else None

    def queue(self) -> AbstractContextManager[Any]:
        """What this thread computes meanwhile does not wait for the engine's steps, nor they for it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def up(self, array: Array) -> Tensor:
        """A tensor of `array`; on the CPU possibly the same memory."""
        return torch.from_numpy(np.require(array, requirements=("C", "W"))).to(self._device)

    def load(self, data: KvArray) -> Tensor:
        """`floats.to_float32` as a tensor.

        Raises:
            ValueError: a value is not finite: a lossy codec cannot represent it.
        """
        bfloat16 = data.dtype == np.dtype("<u2")
        values = (self.up(data.view(np.int16)).view(torch.bfloat16) if bfloat16 else self.up(data)).float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError("KV holds values that are not finite")
        return values


def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def save(values: Tensor, dtype: np.dtype[Any]) -> KvArray:
    """`floats.from_float32` of a tensor; waits for the device."""
    values = values.contiguous()
    if dtype == np.dtype("<u2"):
        return values.bfloat16().view(torch.int16).cpu().numpy().view(dtype)
    if dtype == np.dtype("<f2"):
        values = values.clamp(-65504, 65504).half()
    return values.cpu().numpy()
