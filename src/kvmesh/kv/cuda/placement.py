"""Moves a codec to a device, and back where the device has no room."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvmesh.kv.codec import Buffer, Codec, Format, KvArray, Shape
from kvmesh.kv.codecs.cachegen import CacheGen
from kvmesh.kv.codecs.transform import Transform
from kvmesh.kv.cuda.cachegen import DeviceCacheGen
from kvmesh.kv.cuda.device import Device
from kvmesh.kv.cuda.halves import halved, supported
from kvmesh.kv.cuda.transform import DeviceTransform

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placed:
    """`device` does the work; a chunk for which it has no memory is left to `host`, of the same namespace."""

    device: Codec
    host: Codec

    @property
    def format(self) -> Format:
        return self.host.format

    @property
    def namespace(self) -> str:
        return self.host.namespace

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> Sequence[Buffer]:
        try:
            return self.device.encode(data, first_layer, start)
        except torch.OutOfMemoryError:
            log.warning("no memory on the device to encode %d tokens: the CPU does it", data.shape[2])
        return self.host.encode(data, first_layer, start)

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        try:
            return self.device.decode(parts, shape, dtype, first_layer)
        except torch.OutOfMemoryError:
            log.warning("no memory on the device to decode %d tokens: the CPU does it", shape[2])
        return self.host.decode(parts, shape, dtype, first_layer)


def place(codec: Codec, name: str) -> Codec:
    """`codec` as the torch device `name` computes it best; itself if that is as it is."""
    if name == "cpu":
        return halved(codec) if isinstance(codec, Transform) and supported() else codec
    return moved(codec, Device(name))


def moved(codec: Codec, device: Device) -> Codec:
    """`codec` with its arithmetic on `device`; itself if it has none worth moving."""
    if isinstance(codec, CacheGen):
        return Placed(DeviceCacheGen(codec, device), codec)
    if isinstance(codec, Transform):
        return Placed(DeviceTransform(codec, device), codec)
    return codec
