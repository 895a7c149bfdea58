"""`codecs.cachegen` with its values on a device: the same bytes, and the same values, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvmesh.kv.codec import Format, KvArray, Shape
from kvmesh.kv.codecs.cachegen import SINK, CacheGen, places, sinks_of
from kvmesh.kv.codecs.profile import Level
from kvmesh.kv.cuda.device import Device, save
from kvmesh.kv.cuda.quantiser import DeviceQuantiser


class DeviceCacheGen:
    def __init__(self, codec: CacheGen, device: Device) -> None:
        self._codec, self._device = codec, device
        self._levels = lru_cache(maxsize=1)(self._level)

    @property
    def format(self) -> Format:
        return self._codec.format

    @property
    def namespace(self) -> str:
        return self._codec.namespace

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> tuple[bytes]:
        layers, planes, tokens, heads, dim = data.shape
        if problem := self._codec.problem(data.shape, first_layer):
            raise ValueError(problem)
        sinks = sinks_of(start, tokens)
        with self._device.queue():
            values = self._device.load(data).reshape(layers * planes, tokens, heads * dim)
            anchors, body = self._levels(first_layer, layers).encode(values[:, sinks:])
            return self._codec.join(save(values[:, :sinks], SINK), anchors, body)

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        exact, anchors, body = self._codec.split(parts[0], shape, first_layer)
        with self._device.queue():
            level = self._levels(first_layer, shape[0])
            rest = level.decode(anchors, body, shape[2] - exact.shape[1])
            values = torch.cat((self._device.up(exact.astype(np.float32)), rest), dim=1)
            return save(values, dtype).reshape(shape)

    def _level(self, first_layer: int, layers: int) -> DeviceLevel:
        return DeviceLevel(self._codec.layers(first_layer, layers), self._device)


class DeviceLevel:
    """The quantisers of one quality; values are `[blocks, tokens, columns]`."""

    def __init__(self, level: Level, device: Device) -> None:
        self._group, self._device = level.group, device
        self._anchors = DeviceQuantiser(level.anchors, device) if level.anchors else None
        self._body = DeviceQuantiser(level.body, device)

    def encode(self, values: Tensor) -> tuple[bytes, bytes]:
        """The anchors' part, empty without groups, and the body's."""
        if self._anchors is None:
            return b"", self._body.encode(values)
        anchored, rest = map(self._device.up, places(values.shape[1], self._group))
        firsts = values[:, :: self._group]
        anchors = self._anchors.encode(firsts)
        decoded = self._anchors.decode(anchors, firsts.shape[1])
        return anchors, self._body.encode(values[:, rest] - decoded[:, anchored[rest]])

    def decode(self, anchors: memoryview, body: memoryview, tokens: int) -> Tensor:
        """The inverse; raises CorruptChunk."""
        if self._anchors is None:
            return self._body.decode(body, tokens)
        anchored, rest = map(self._device.up, places(tokens, self._group))
        values = self._anchors.decode(anchors, -(-tokens // self._group))[:, anchored]
        values[:, rest] += self._body.decode(body, len(rest))
        return values
