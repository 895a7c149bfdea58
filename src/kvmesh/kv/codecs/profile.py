"""What is measured once per model: steps, distributions and the classes of channels, for each level of quality.

    0   4   magic "KVMP"          16  32  revision of the model's weights, SHA-256
    4   2   version               48   …  means float16 [blocks, columns], then the levels
    6   2   levels                end 32  SHA-256 of all before
    8   2   layers                        a level: group uint16, parts uint16; its parts: the anchors' if group, then
    10  2   planes (K, V)                 the body's
    12  2   kv_heads                      a part: classes uint16, symbols uint16, steps float32 [blocks],
    14  2   head_dim                      class uint8 [blocks, columns], frequencies uint16 [classes, symbols]

blocks = layers * planes, columns = kv_heads * head_dim. The hash at the end names the profile: chunks carry it, and so
does the namespace. A file is untrusted until it has been read to its end. Knows no chunk.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.errors import InvalidArgument
from kvmesh.kv.codecs.floats import Floats
from kvmesh.kv.codecs.quantiser import Quantiser
from kvmesh.kv.codecs.rans import Tables

VERSION = 1
MAX_BYTES = 64 << 20
MAX_LEVELS = 32
HASH_BYTES = 32

_MAGIC = b"KVMP"
_HEAD = struct.Struct("<4s6H32s")
_PAIR = struct.Struct("<2H")
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
        content = b"".join((head, self.means.astype("<f2").tobytes(), *map(_level_bytes, self.levels)))
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
        return _Reader(content, shape).profile(count, revision)
    except (ValueError, struct.error) as error:
        raise InvalidArgument(f"the codec profile is not usable: {error}") from error


class _Reader:
    """Reads front to back; numpy refuses what is not there, so no length is believed."""

    def __init__(self, content: bytes, shape: list[int]) -> None:
        layers, planes, heads, dim = shape
        self._content = content
        self._offset = _HEAD.size
        self._shape = (layers, planes, heads, dim)
        self._blocks, self._columns = layers * planes, heads * dim
        if not 0 < self._blocks * self._columns <= _ROOM:
            raise ValueError(f"impossible shape {self._shape}")

    def profile(self, levels: int, revision: bytes) -> Profile:
        means = self._array("<f2", self._blocks, self._columns).astype(np.float32)
        if not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"{levels} levels")
        profile = Profile(self._shape, revision, means, tuple(self._level(means) for _ in range(levels)))
        if self._offset != len(self._content):
            raise ValueError("there are bytes beyond the last level")
        return profile

    def _level(self, means: Floats) -> Level:
        group, parts = self._pair()
        if group == 1 or parts != (2 if group else 1):
            raise ValueError(f"{parts} parts in groups of {group}")
        if not group:
            return Level(0, None, self._part(means))
        return Level(group, self._part(means), self._part(np.zeros_like(means)))

    def _part(self, means: Floats) -> Quantiser:
        classes, symbols = self._pair()
        steps = self._array("<f4", self._blocks)
        members = self._array("u1", self._blocks, self._columns).astype("<u2")
        return Quantiser(means, steps, members, Tables(self._array("<u2", classes, symbols)))

    def _pair(self) -> tuple[int, int]:
        first, second = _PAIR.unpack_from(self._content, self._offset)
        self._offset += _PAIR.size
        return first, second

    def _array(self, dtype: str, *shape: int) -> npt.NDArray[Any]:
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(self._content, dtype, count, self._offset).reshape(shape)
        self._offset += array.nbytes
        return array


def _level_bytes(level: Level) -> bytes:
    parts = [part for part in (level.anchors, level.body) if part]
    return _PAIR.pack(level.group, len(parts)) + b"".join(map(_part_bytes, parts))


def _part_bytes(part: Quantiser) -> bytes:
    arrays = (part.steps.astype("<f4"), part.classes.astype("u1"), part.tables.frequencies)
    return _PAIR.pack(part.tables.classes, part.tables.symbols) + b"".join(array.tobytes() for array in arrays)
