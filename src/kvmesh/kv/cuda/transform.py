"""`codecs.transform` with its values on a device.

Symbols mean the same there; values differ from the CPU's by how sums of products round, in the last bits of a float32.
So may a cell that lies on an edge: bitstreams of both are of one namespace, and equally good.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvmesh.kv.codec import Format, KvArray, Shape
from kvmesh.kv.codecs import embedded
from kvmesh.kv.codecs.cachegen import SINK, sinks_of
from kvmesh.kv.codecs.transform import Transform
from kvmesh.kv.cuda.basis import DeviceBasis, turn
from kvmesh.kv.cuda.device import Device, save
from kvmesh.kv.cuda.quantiser import DeviceQuantiser


class DeviceTransform:
    def __init__(self, codec: Transform, device: Device) -> None:
        self._codec, self._device, self._profile = codec, device, codec.transform

    @property
    def format(self) -> Format:
        return self._codec.format

    @property
    def namespace(self) -> str:
        return self._codec.namespace

    @cached_property
    def _bases(self) -> list[DeviceBasis]:
        return [DeviceBasis(basis, self._device) for basis in self._profile.bases]

    @cached_property
    def _detail(self) -> DeviceQuantiser:
        return DeviceQuantiser(self._profile.detail, self._device)

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> list[bytes]:
        if problem := self._codec.problem(data.shape, first_layer):
            raise ValueError(problem)
        sinks, renditions = sinks_of(start, data.shape[2]), self._codec.renditions
        with self._device.queue():
            values = self._device.load(data)
            weighted = self._weigh(values[:, :, sinks:], start + sinks)
            finest = self._quantise(weighted)
            cells = renditions.nested(embedded.nested(finest.cpu().numpy(), self._codec.coded))
            parts = renditions.encode(cells)
            if self._codec.detailed:
                known = self._values(finest, len(cells))
                missing = _by_layer(weighted, data.shape[0]) - _by_layer(known, data.shape[0])
                parts.append(self._detail.encode(missing))
            return self._codec.join(save(values[:, :, :sinks], SINK), start, parts)

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        exact, start, parts = self._codec.split(parts, shape, first_layer)
        layers, sinks = shape[0], exact.shape[2]
        with self._device.queue():
            weighted = self._decode(parts, shape, shape[2] - sinks)
            planes = [basis.unweigh(plane, layers) for basis, plane in zip(self._bases, weighted, strict=True)]
            planes[0] = turn(self._profile.rotary, planes[0], start + sinks, 1, self._device)
            sink_values = self._device.up(exact.astype(np.float32))
            return save(torch.cat((sink_values, torch.stack(planes, dim=1)), dim=2), dtype)

    def _weigh(self, values: Tensor, position: int) -> list[Tensor]:
        """For each plane `[tokens, layers * heads * dim]`."""
        planes = list(values.unbind(1))
        planes[0] = turn(self._profile.rotary, planes[0], position, -1, self._device)
        return [basis.weigh(plane) for basis, plane in zip(self._bases, planes, strict=True)]

    def _quantise(self, weighted: Sequence[Tensor]) -> Tensor:
        """The cells of the finest rendition that is encoded, int32 `[tokens, components of all planes]`."""
        count, ranks = self._codec.coded, self._profile.ranks
        planes = zip(self._bases, weighted, self._profile.reach[count - 1].tolist(), ranks, strict=True)
        coefficients = [
            torch.nn.functional.pad(basis.project(plane, reached), (0, rank - reached))
            for basis, plane, reached, rank in planes
        ]
        return quantise(torch.cat(coefficients, dim=1), self._codec.renditions.step(count), count)

    def _values(self, cells: Tensor, count: int) -> list[Tensor]:
        """What the cells of rendition `count` stand for, weighted."""
        renditions = self._codec.renditions
        planes = dequantise(cells, renditions.step(count)).tensor_split(renditions.starts[1:], dim=1)
        return [basis.expand(plane) for basis, plane in zip(self._bases, planes, strict=True)]

    def _decode(self, parts: Sequence[memoryview], shape: Shape, tokens: int) -> list[Tensor]:
        """The weighted values of each plane; raises CorruptChunk."""
        layers, planes, _, heads, dim = shape
        count = min(len(parts), self._profile.renditions)
        cells = self._codec.renditions.decode(parts[:count], tokens)
        weighted = self._values(self._device.up(cells), count)
        if len(parts) == count:
            return weighted
        detail = self._detail.decode(parts[-1], tokens).reshape(layers, planes, tokens, heads * dim)
        missing = (plane.transpose(0, 1).flatten(1) for plane in detail.unbind(1))
        return [plane + rest for plane, rest in zip(weighted, missing, strict=True)]


def quantise(values: Tensor, step: float, renditions: int) -> Tensor:
    """The finest cells, int32, as `embedded.quantise`, bit by bit."""
    largest = embedded.LARGEST << (renditions - 1)
    x = (values.abs() * (1 / step)).clamp(max=largest)
    cells = (x.int() + 1).clamp(max=largest) * (x >= 0.5)
    return torch.where(values < 0, -cells, cells)


def dequantise(cells: Tensor, step: float) -> Tensor:
    """The middles of cells, as `embedded.dequantise`, bit by bit."""
    sizes = cells.abs()
    middles = torch.where(sizes > 1, (sizes.float() - 0.5) * step, sizes * (0.75 * step))
    return torch.where(cells < 0, -middles, middles)


def _by_layer(planes: Sequence[Tensor], layers: int) -> Tensor:
    """`[layers * planes, tokens, heads * dim]` of planes `[tokens, layers * heads * dim]`."""
    stacked = torch.stack([plane.reshape(len(plane), layers, plane.shape[1] // layers) for plane in planes], dim=2)
    return stacked.permute(1, 2, 0, 3).flatten(0, 1)
