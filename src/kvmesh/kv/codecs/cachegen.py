"""CacheGen's bitstream (Liu et al., SIGCOMM 2024, arXiv 2310.07240), its distributions kept outside of the chunks.

    0   1   version               4   4   bytes of the anchors' part, 0 in a level without groups
    1   1   level                 8   16  first half of the profile's hash
    2   1   sinks                 24  …   float16 [blocks, sinks, columns]
    3   1   zero                      …   the anchors, then the body: parts as `quantiser` writes them

A level quantises with one step per layer and plane, in units of what that layer's values measured on average, and codes
with one of a few static distributions, chosen per (layer, plane, channel) when the profile was made. With groups, the
first token of each is an anchor of 8 bits and the others are differences to it as decoded; without, tokens stand for
themselves, which costs less on the models measured. Every chunk decodes alone.

The first tokens of a text are attention sinks: nearly all later tokens attend to them, so that their noise is in every
output (StreamingLLM, arXiv 2309.17453). They stay in half precision; coded like the others, they cost 4 times the KL.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvmesh.errors import InvalidArgument
from kvmesh.kv.codec import CACHEGEN, CorruptChunk, Format, KvArray, Shape
from kvmesh.kv.codecs.floats import Floats, from_float32, to_float32
from kvmesh.kv.codecs.profile import Level, Profile

VERSION = 1
DEFAULT_LEVEL = 2
SINK_TOKENS = 4

SINK = np.dtype("<f2")
"""What the sinks are stored in."""

_HEAD = struct.Struct("<4BI16s")
_NAME_BYTES = 16


@dataclass(frozen=True, eq=False)
class CacheGen:
    """The codec of one level, counted from 1.

    Raises:
        InvalidArgument: the profile has no such level.
    """

    profile: Profile
    level: int = DEFAULT_LEVEL
    format: Format = CACHEGEN

    def __post_init__(self) -> None:
        if not 1 <= self.level <= len(self.profile.levels):
            raise InvalidArgument(f"level {self.level} is not one of the profile's 1 to {len(self.profile.levels)}")

    @property
    def namespace(self) -> str:
        return f"cachegen/{VERSION}:{self.level}:{self.profile.hash.hex()}"

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> tuple[bytes]:
        layers, planes, tokens, heads, dim = data.shape
        if problem := self.problem(data.shape, first_layer):
            raise ValueError(problem)
        values = to_float32(data).reshape(layers * planes, tokens, heads * dim)
        sinks = sinks_of(start, tokens)
        exact = from_float32(values[:, :sinks], SINK)
        return self.join(exact, *_encode(self.layers(first_layer, layers), np.ascontiguousarray(values[:, sinks:])))

    def join(self, exact: KvArray, anchors: bytes, body: bytes) -> tuple[bytes]:
        """The payload of sinks `[blocks, sinks, columns]` in half precision and of two parts."""
        head = _HEAD.pack(VERSION, self.level, exact.shape[1], 0, len(anchors), self.profile.hash[:_NAME_BYTES])
        return (b"".join((head, exact.tobytes(), anchors, body)),)

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        exact, anchors, body = self.split(parts[0], shape, first_layer)
        sinks = exact.shape[1]
        rest = _decode(self.layers(first_layer, shape[0]), anchors, body, shape[2] - sinks)
        values = np.concatenate((exact.astype(np.float32), rest), axis=1) if sinks else rest
        return from_float32(values, dtype).reshape(shape)

    def split(self, payload: memoryview, shape: Shape, first_layer: int) -> tuple[KvArray, memoryview, memoryview]:
        """What `join` was given; raises CorruptChunk."""
        layers, planes, tokens, heads, dim = shape
        sinks, size = self._read_head(payload)
        if problem := self.problem(shape, first_layer):
            raise CorruptChunk(problem)
        blocks, columns = layers * planes, heads * dim
        coded = _HEAD.size + blocks * sinks * columns * SINK.itemsize
        if sinks > tokens or coded + size > len(payload):
            raise CorruptChunk(f"{sinks} sinks and {size} bytes of anchors cannot be")
        exact = np.frombuffer(payload[_HEAD.size : coded], SINK).reshape(blocks, sinks, columns)
        if not np.isfinite(exact).all():
            raise CorruptChunk("a sink is not finite")
        return exact, payload[coded : coded + size], payload[coded + size :]

    def _read_head(self, payload: memoryview) -> tuple[int, int]:
        """Sinks, and bytes of the anchors' part; raises CorruptChunk."""
        if len(payload) < _HEAD.size:
            raise CorruptChunk("shorter than a CacheGen header")
        version, level, sinks, zero, size, name = _HEAD.unpack_from(payload)
        if version != VERSION or zero or level != self.level:
            raise CorruptChunk(f"CacheGen version {version}, level {level} where {VERSION} and {self.level} are due")
        if name != self.profile.hash[:_NAME_BYTES]:
            raise CorruptChunk(f"made with the profile {name.hex()}, not {self.profile.hash[:_NAME_BYTES].hex()}")
        if (size > 0) != (self.profile.levels[level - 1].anchors is not None):
            raise CorruptChunk(f"{size} bytes of anchors cannot be")
        return sinks, size

    def problem(self, shape: tuple[int, ...], first_layer: int) -> str:
        """Why KV of this shape cannot be coded; empty if it can."""
        layers, planes, _, heads, dim = shape
        own_layers, *own = self.profile.shape
        if [planes, heads, dim] == own and first_layer + layers <= own_layers:
            return ""
        return f"KV of shape {shape} from layer {first_layer} does not fit a profile of {self.profile.shape}"

    def layers(self, first_layer: int, layers: int) -> Level:
        """The quantisers of some layers."""
        planes, level = self.profile.shape[1], self.profile.levels[self.level - 1]
        if layers == self.profile.shape[0]:
            return level
        start, stop = first_layer * planes, (first_layer + layers) * planes
        anchors = level.anchors and level.anchors.slice(start, stop)
        return Level(level.group, anchors, level.body.slice(start, stop))


def sinks_of(start: int, tokens: int) -> int:
    """How many of `tokens` tokens from position `start` on are sinks."""
    return max(0, min(SINK_TOKENS - start, tokens))


def _encode(level: Level, values: Floats) -> tuple[bytes, bytes]:
    """The anchors' part, empty without groups, and the body's."""
    if level.anchors is None:
        return b"", level.body.encode(values)
    anchored, rest = places(values.shape[1], level.group)
    firsts = np.ascontiguousarray(values[:, :: level.group])
    anchors = level.anchors.encode(firsts)
    decoded = level.anchors.decode(anchors, firsts.shape[1])
    return anchors, level.body.encode(values.take(rest, 1) - decoded.take(anchored[rest], 1))


def _decode(level: Level, anchors: memoryview, body: memoryview, tokens: int) -> Floats:
    if level.anchors is None:
        return level.body.decode(body, tokens)
    anchored, rest = places(tokens, level.group)
    values = level.anchors.decode(anchors, -(-tokens // level.group)).take(anchored, 1)
    values[:, rest] += level.body.decode(body, len(rest))
    return values


def places(tokens: int, group: int) -> tuple[KvArray, KvArray]:
    """For each token the index of its anchor; the tokens that are none."""
    positions = np.arange(tokens)
    return positions // group, positions[positions % group > 0]
