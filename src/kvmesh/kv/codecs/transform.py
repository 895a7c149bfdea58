"""KV as few coefficients: turned back, weighted by what errors cost, projected across layers, coded coarse to fine.

Each quality layer holds a part of all planes; `renditions` and `quantiser` say how the strings lie::

    layer 1      0   1   version           8   16  first half of the profile's hash
                 1   1   sinks             24  …   float16 sinks [layers, planes, sinks, kv_heads, head_dim]
                 2   2   zero              …   …   the first rendition
                 4   4   first position
    layer 2 …    0   …   a rendition
    the last     0   …   the detail: what is missing of the weighted values

Any first layers decode to a rendition
of their own step, so one namespace holds them all. A chunk decodes alone. A text's first tokens are attention sinks and
stay in half precision, as in `cachegen`. After KVTC (arXiv 2511.01815), with the Fisher information as the weight.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvmesh.errors import InvalidArgument
from kvmesh.kv.codec import TRANSFORM, CorruptChunk, Format, KvArray, Shape
from kvmesh.kv.codecs.cachegen import SINK, SINK_TOKENS, sinks_of
from kvmesh.kv.codecs.floats import Floats, from_float32, to_float32
from kvmesh.kv.codecs.profile import Profile
from kvmesh.kv.codecs.renditions import Renditions
from kvmesh.kv.codecs.transform_profile import TransformProfile

VERSION = 1

_HEAD = struct.Struct("<2BHI16s")
_NAME_BYTES = 16


@dataclass(frozen=True, eq=False)
class Transform:
    """Encodes `level` quality layers, all by default; decodes as many as there are.

    Raises:
        InvalidArgument: the profile has no transform, one that is not usable, or no such level.
    """

    profile: Profile
    level: int | None = None
    format: Format = TRANSFORM

    def __post_init__(self) -> None:
        if self.profile.transform is None:
            raise InvalidArgument("the codec profile holds no transform: `kvmesh kv calibrate` makes one that does")
        last = self.transform.quality_layers
        if self.level is not None and not 1 <= self.level <= last:
            raise InvalidArgument(f"level {self.level} is not one of the profile's 1 to {last}")
        try:
            for basis in self.transform.bases:
                basis.ready()
        except ValueError as error:
            raise InvalidArgument(f"the codec profile is not usable: {error}") from error

    @property
    def namespace(self) -> str:
        return f"transform/{VERSION}:{self.profile.hash.hex()}"

    @property
    def transform(self) -> TransformProfile:
        assert self.profile.transform is not None
        return self.profile.transform

    @property
    def renditions(self) -> Renditions:
        return Renditions(self.transform)

    @property
    def coded(self) -> int:
        """Renditions that are encoded."""
        return min(self.level or self.transform.renditions, self.transform.renditions)

    @property
    def detailed(self) -> bool:
        """If the detail is encoded too."""
        return self.level is None or self.level > self.transform.renditions

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> list[bytes]:
        if problem := self.problem(data.shape, first_layer):
            raise ValueError(problem)
        values = to_float32(data)
        sinks = sinks_of(start, data.shape[2])
        exact = from_float32(np.ascontiguousarray(values[:, :, :sinks]), SINK)
        weighted = self._weigh(values[:, :, sinks:], start + sinks)
        cells = self.renditions.quantise(weighted, self.coded)
        parts = self.renditions.encode(cells)
        if self.detailed:
            known = self.renditions.values(cells[-1], len(cells))
            parts.append(self.transform.detail.encode(_by_layer(weighted, data.shape) - _by_layer(known, data.shape)))
        return self.join(exact, start, parts)

    def join(self, exact: KvArray, start: int, parts: list[bytes]) -> list[bytes]:
        """The payload of sinks `[layers, planes, sinks, kv_heads, head_dim]`, the first at `start`, and of parts."""
        head = _HEAD.pack(VERSION, exact.shape[2], 0, start, self.profile.hash[:_NAME_BYTES])
        return [b"".join((head, exact.tobytes(), parts[0])), *parts[1:]]

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        exact, start, parts = self.split(parts, shape, first_layer)
        layers, planes, tokens, heads, dim = shape
        sinks = exact.shape[2]
        weighted = self._decode(parts, (layers, planes, tokens - sinks, heads, dim))
        values = np.empty(shape, np.float32)
        values[:, :, :sinks] = exact
        for plane, basis in enumerate(self.transform.bases):
            rest = basis.unweigh(weighted[plane], layers)
            values[:, plane, sinks:] = rest if plane else self.transform.rotary.apply(rest, start + sinks)
        return from_float32(values, dtype)

    def split(
        self, parts: Sequence[memoryview], shape: Shape, first_layer: int
    ) -> tuple[KvArray, int, list[memoryview]]:
        """What `join` was given; raises CorruptChunk."""
        layers, planes, _, heads, dim = shape
        if problem := self.problem(shape, first_layer):
            raise CorruptChunk(problem)
        if len(parts) > self.transform.quality_layers:
            raise CorruptChunk(f"{len(parts)} quality layers where {self.transform.quality_layers} are known")
        sinks, start, size = self._read_head(parts[0], shape)
        exact = np.frombuffer(parts[0][_HEAD.size : size], SINK).reshape(layers, planes, sinks, heads, dim)
        if not np.isfinite(exact).all():
            raise CorruptChunk("a sink is not finite")
        return exact, start, [parts[0][size:], *parts[1:]]

    def _weigh(self, values: Floats, position: int) -> list[Floats]:
        """For each plane `[tokens, layers * heads * dim]`."""
        keys = self.transform.rotary.undo(values[:, 0], position)
        planes = (keys, *(values[:, plane] for plane in range(1, values.shape[1])))
        return [basis.weigh(plane) for basis, plane in zip(self.transform.bases, planes, strict=True)]

    def _decode(self, parts: Sequence[memoryview], shape: Shape) -> list[Floats]:
        """The weighted values of each plane; raises CorruptChunk."""
        layers, planes, tokens, heads, dim = shape
        count = min(len(parts), self.transform.renditions)
        weighted = self.renditions.values(self.renditions.decode(parts[:count], tokens), count)
        if len(parts) > count:
            detail = self.transform.detail.decode(parts[-1], tokens).reshape(layers, planes, tokens, heads * dim)
            for plane, values in enumerate(weighted):
                values.reshape(tokens, layers, heads * dim)[:] += detail[:, plane].transpose(1, 0, 2)
        return weighted

    def _read_head(self, part: memoryview, shape: Shape) -> tuple[int, int, int]:
        """Sinks, the first position, and bytes of both; raises CorruptChunk."""
        layers, planes, tokens, heads, dim = shape
        if len(part) < _HEAD.size:
            raise CorruptChunk("shorter than its head")
        version, sinks, zero, start, name = _HEAD.unpack_from(part)
        if version != VERSION or zero or sinks > min(tokens, SINK_TOKENS):
            raise CorruptChunk(f"version {version} with {sinks} sinks where {VERSION} is due")
        if name != self.profile.hash[:_NAME_BYTES]:
            raise CorruptChunk(f"made with the profile {name.hex()}, not {self.profile.hash[:_NAME_BYTES].hex()}")
        size = _HEAD.size + layers * planes * sinks * heads * dim * SINK.itemsize
        if len(part) < size:
            raise CorruptChunk("shorter than its sinks")
        return sinks, start, size

    def problem(self, shape: tuple[int, ...], first_layer: int) -> str:
        """Why KV of this shape cannot be coded; empty if it can."""
        layers, planes, _, heads, dim = shape
        if (layers, planes, heads, dim) == self.profile.shape and first_layer == 0:
            return ""
        return f"KV of shape {shape} from layer {first_layer} does not fit a transform of all of {self.profile.shape}"


def _by_layer(planes: Sequence[Floats], shape: tuple[int, ...]) -> Floats:
    """`[layers * planes, tokens, heads * dim]` of planes `[tokens, layers * heads * dim]`."""
    layers, tokens, columns = shape[0], len(planes[0]), shape[3] * shape[4]
    stacked = np.stack([plane.reshape(tokens, layers, columns) for plane in planes], axis=2)
    return np.ascontiguousarray(stacked.transpose(1, 2, 0, 3)).reshape(layers * len(planes), tokens, columns)
