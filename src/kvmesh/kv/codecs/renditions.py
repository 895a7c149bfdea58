"""Renditions of the coefficients of a chunk, each finer and of more components than the one before.

A rendition is coded as::

    0   2p  for each of p planes: n, its components that are coded, uint16
    2p  4   bytes of the refinement, 0 in the first rendition
    …   …   the refinement: those of the n that the rendition before reached
    …   …   what is added: the others

Components lie side by side, plane after plane; those that are not coded are 0. Knows no text and no position.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvmesh.kv.codec import CorruptChunk, KvArray
from kvmesh.kv.codecs import embedded
from kvmesh.kv.codecs.basis import used_columns
from kvmesh.kv.codecs.floats import Floats
from kvmesh.kv.codecs.transform_profile import TransformProfile

_USED = np.dtype("<u2")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class Renditions:
    """Cells are int32 `[tokens, components of all planes]`, weighted values float32 `[tokens, width]` by plane."""

    transform: TransformProfile

    def quantise(self, weighted: Sequence[Floats], count: int) -> list[KvArray]:
        """The cells of the first `count` renditions, coarse to fine."""
        transform = self.transform
        coefficients = np.zeros((len(weighted[0]), sum(transform.ranks)), np.float32)
        planes = zip(transform.bases, weighted, transform.reach[count - 1].tolist(), self.starts, strict=True)
        for basis, plane, reached, start in planes:
            coefficients[:, start : start + reached] = basis.project(plane, reached)
        return self.nested(embedded.quantise(coefficients, self.step(count), count))

    def nested(self, renditions: list[KvArray]) -> list[KvArray]:
        """Each of the first renditions with no more components than it reaches; changes them in place."""
        transform = self.transform
        for cells, reach in zip(renditions[:-1], transform.reach, strict=False):
            for start, reached, rank in zip(self.starts, reach, transform.ranks, strict=True):
                cells[:, start + reached : start + rank] = 0
        return renditions

    def values(self, cells: KvArray, count: int) -> list[Floats]:
        """What the cells of rendition `count` stand for, weighted."""
        planes = np.split(embedded.dequantise(cells, self.step(count)), self.starts[1:], axis=1)
        return [basis.expand(plane) for basis, plane in zip(self.transform.bases, planes, strict=True)]

    def encode(self, renditions: Sequence[KvArray]) -> list[bytes]:
        """A part for each rendition."""
        return [self._encode(number, cells, renditions[number - 1]) for number, cells in enumerate(renditions)]

    def _encode(self, number: int, cells: KvArray, coarse: KvArray) -> bytes:
        used = [used_columns(plane) for plane in np.split(cells, self.starts[1:], axis=1)]
        fresh, known = self._columns(number, used)
        refined = b""
        if number:
            coder = self.transform.refinements[number - 1]
            refined = coder.encode(np.ascontiguousarray(coarse[:, known]), cells[:, known], known)
        added = self.transform.firsts[number].encode(cells[:, fresh], fresh)
        return b"".join((np.array(used, _USED).tobytes(), _LENGTH.pack(len(refined)), refined, added))

    def decode(self, parts: Sequence[memoryview], tokens: int) -> KvArray:
        """The cells of the last of the renditions that `parts` are; raises CorruptChunk."""
        cells = np.zeros((tokens, sum(self.transform.ranks)), np.int32)
        for number, part in enumerate(parts):
            used, refined, added = self._split(part)
            fresh, known = self._columns(number, used)
            if number:
                coder = self.transform.refinements[number - 1]
                cells[:, known] = coder.decode(refined, cells[:, known], known)
            elif len(refined):
                raise CorruptChunk("a first rendition that refines")
            cells[:, fresh] = self.transform.firsts[number].decode(added, tokens, fresh)
        return cells

    def step(self, count: int) -> float:
        """That of rendition `count`."""
        return float(1 << (self.transform.renditions - count))

    @property
    def starts(self) -> list[int]:
        """Where the components of each plane begin."""
        return [0, *np.cumsum(self.transform.ranks)[:-1].tolist()]

    def _columns(self, number: int, used: Sequence[int]) -> tuple[KvArray, KvArray]:
        """Which components a rendition adds and which it refines, if so many of each plane are coded."""
        known = self.transform.reach[number - 1].tolist() if number else [0] * len(used)
        spans = [(start, start + min(a, b), start + b) for start, a, b in zip(self.starts, known, used, strict=True)]
        fresh, refined = [(middle, end) for _, middle, end in spans], [(start, middle) for start, middle, _ in spans]
        return _ranges(fresh), _ranges(refined)

    def _split(self, part: memoryview) -> tuple[list[int], memoryview, memoryview]:
        """How many components are coded, the refinement and what is added; raises CorruptChunk."""
        ranks = self.transform.ranks
        head = len(ranks) * _USED.itemsize + _LENGTH.size
        if len(part) < head:
            raise CorruptChunk("a rendition without its head")
        used = np.frombuffer(part[: head - _LENGTH.size], _USED).tolist()
        (length,) = _LENGTH.unpack_from(part, head - _LENGTH.size)
        if any(count > rank for count, rank in zip(used, ranks, strict=True)) or length > len(part) - head:
            raise CorruptChunk(f"{used} components where there are {ranks}, or {length} bytes that refine them")
        return used, part[head : head + length], part[head + length :]


def _ranges(spans: Sequence[tuple[int, int]]) -> KvArray:
    return np.concatenate([np.arange(start, end) for start, end in spans])
