"""What is measured once per model: steps, distributions and the classes of channels, for each level of quality.

    0   4   magic "KVMP"          16  32  revision of the model's weights, SHA-256
    4   2   version               48   …  means float16 [blocks, columns], then the levels
    6   2   levels                end 32  SHA-256 of all before
    8   2   layers                        a level: group uint16, parts uint16; its parts: the anchors' if group, then
    10  2   planes (K, V)                 the body's
    12  2   kv_heads                      a part: classes uint16, symbols uint16, steps float32 [blocks],
    14  2   head_dim                      class uint8 [blocks, columns], frequencies uint16 [classes, symbols]
                                          then, if there are bytes left, what `transform_profile` reads

blocks = layers * planes, columns = kv_heads * head_dim. The hash at the end names the profile: chunks carry it, and so
does the namespace. A file is untrusted until it has been read to its end. Knows no chunk.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from kvmesh.errors import InvalidArgument
from kvmesh.kv.codecs.floats import Floats
from kvmesh.kv.codecs.quantiser import Quantiser
from kvmesh.kv.codecs.rans import Tables
from kvmesh.kv.codecs.reader import Reader, pair
from kvmesh.kv.codecs.transform_profile import TransformProfile
from kvmesh.kv.codecs.transform_profile import read as read_transform

VERSION = 2
MAX_BYTES = 256 << 20
MAX_LEVELS = 32
HASH_BYTES = 32

_MAGIC = b"KVMP"
_HEAD = struct.Struct("<4s6H32s")
_ROOM = 1 << 24
"""Blocks times columns at most: the KV elements of one token."""


@dataclass(frozen=True, eq=False)
class Level:
    """One quality. `group`: tokens per anchor, 0 without anchors; then `anchors` is None."""

    group: int
    anchors: Quantiser | None
    body: Quantiser


@dataclass(frozen=True, eq=False)
class Profile:
    """`shape`: layers, planes, kv_heads, head_dim; `revision`: 32 bytes that identify the weights."""

    shape: tuple[int, int, int, int]
    revision: bytes
    means: Floats
    levels: tuple[Level, ...]
    transform: TransformProfile | None = None

    @property
    def blocks(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def columns(self) -> int:
        return self.shape[2] * self.shape[3]

    @cached_property
    def data(self) -> bytes:
        """The file."""
        head = _HEAD.pack(_MAGIC, VERSION, len(self.levels), *self.shape, self.revision)
        transform = self.transform.data if self.transform else b""
        content = b"".join((head, self.means.astype("<f2").tobytes(), *map(_level_bytes, self.levels), transform))
        return content + sha256(content).digest()

    @property
    def hash(self) -> bytes:
        return self.data[-HASH_BYTES:]


def read(path: Path) -> Profile:
    """The profile of a file; errors as `parse`, or OSError."""
    with path.open("rb") as file:
        return parse(file.read(MAX_BYTES + 1))


def parse(data: bytes) -> Profile:
    """A profile from its bytes.

    Raises:
        InvalidArgument: they are not exactly a profile of this version.
    """
    if not _HEAD.size + HASH_BYTES < len(data) <= MAX_BYTES:
        raise InvalidArgument(f"{len(data)} bytes are not a codec profile")
    content, digest = data[:-HASH_BYTES], data[-HASH_BYTES:]
    magic, version, count, *shape, revision = _HEAD.unpack_from(content)
    if magic != _MAGIC or version != VERSION:
        raise InvalidArgument(f"not a codec profile of version {VERSION}")
    if sha256(content).digest() != digest:
        raise InvalidArgument("the codec profile is damaged: its hash does not hold")
    try:
        layers, planes, heads, dim = shape
        return _profile(Reader(content, _HEAD.size), (layers, planes, heads, dim), count, revision)
    except (ValueError, struct.error) as error:
        raise InvalidArgument(f"the codec profile is not usable: {error}") from error


def _profile(reader: Reader, shape: tuple[int, int, int, int], levels: int, revision: bytes) -> Profile:
    blocks, columns = shape[0] * shape[1], shape[2] * shape[3]
    if not 0 < blocks * columns <= _ROOM:
        raise ValueError(f"impossible shape {shape}")
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"{levels} levels")
    means = reader.array("<f2", blocks, columns).astype(np.float32)
    read_levels = tuple(_level(reader, means) for _ in range(levels))
    transform = None if reader.done else read_transform(reader, shape)
    if not reader.done:
        raise ValueError("there are bytes beyond the end")
    return Profile(shape, revision, means, read_levels, transform)


def _level(reader: Reader, means: Floats) -> Level:
    group, parts = reader.pair()
    if group == 1 or parts != (2 if group else 1):
        raise ValueError(f"{parts} parts in groups of {group}")
    if not group:
        return Level(0, None, _part(reader, means))
    return Level(group, _part(reader, means), _part(reader, np.zeros_like(means)))


def _part(reader: Reader, means: Floats) -> Quantiser:
    classes, symbols = reader.pair()
    steps = reader.array("<f4", len(means))
    members = reader.array("u1", *means.shape).astype("<u2")
    return Quantiser(means, steps, members, Tables(reader.array("<u2", classes, symbols)))


def _level_bytes(level: Level) -> bytes:
    parts = [part for part in (level.anchors, level.body) if part]
    return pair(level.group, len(parts)) + b"".join(map(_part_bytes, parts))


def _part_bytes(part: Quantiser) -> bytes:
    arrays = (part.steps.astype("<f4"), part.classes.astype("u1"), part.tables.frequencies)
    return pair(part.tables.classes, part.tables.symbols) + b"".join(array.tobytes() for array in arrays)
