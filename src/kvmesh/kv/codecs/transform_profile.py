"""What the transform codec has measured of a model: how to turn, weigh and project its KV, and how that is distributed.

    0   2   planes            a basis: components of 8, 4 and 2 bits, uint16 each, means float16 [heads, dim], upper
    2   2   pairs that turn            triangles of roots float16 [heads, …], the components
    4   2   where they start  a coder: classes uint16, symbols uint16, class uint8 [components of all planes, or for the
    6   2   renditions                 detail blocks, columns], frequencies uint16 [tables, symbols]
    8   4   detail's step
    12  …   reach uint16 [renditions, planes], frequencies float32 [layers, pairs], the bases, the coders: a First for
            each rendition, then a Refinement for each but the first, then the detail's

heads: of all layers. Each rendition, coarse to fine, reaches more components: those that it adds are coded by its
`embedded.First`, those that it refines by its `embedded.Refinement`. The finest step is 1, in units of the roots. The
detail codes what is then missing, weighted, by `quantiser`. Knows no chunk.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kv.codecs import basis as bases
from kvmesh.kv.codecs.basis import Basis
from kvmesh.kv.codecs.embedded import CONTEXTS, First, Refinement
from kvmesh.kv.codecs.quantiser import Quantiser
from kvmesh.kv.codecs.rans import Tables
from kvmesh.kv.codecs.reader import Reader, pair
from kvmesh.kv.codecs.rotary import Rotary

Array = npt.NDArray[Any]

MAX_RENDITIONS = 15

_HEAD = struct.Struct("<4Hf")


@dataclass(frozen=True, eq=False)
class TransformProfile:
    """`bases`: one per plane. `detail`: of weighted values `[layers * planes, tokens, kv_heads * head_dim]`."""

    rotary: Rotary
    bases: tuple[Basis, ...]
    reach: Array
    firsts: tuple[First, ...]
    refinements: tuple[Refinement, ...]
    detail: Quantiser

    def __post_init__(self) -> None:
        coders: tuple[First | Refinement, ...] = (*self.firsts, *self.refinements)
        if any(len(coder.classes) != sum(self.ranks) for coder in coders):
            raise ValueError("classes are not as many as components")
        if (np.diff(self.reach.astype(np.int64), axis=0) < 0).any() or (self.reach > self.ranks).any():
            raise ValueError(f"renditions of {self.ranks} components cannot reach {self.reach.tolist()}")

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(basis.rank for basis in self.bases)

    @property
    def quality_layers(self) -> int:
        """Renditions and the detail."""
        return self.renditions + 1

    @property
    def renditions(self) -> int:
        return len(self.firsts)

    @cached_property
    def data(self) -> bytes:
        """Its section of a profile's file."""
        rotary, step = self.rotary, float(self.detail.steps[0])
        head = _HEAD.pack(len(self.bases), rotary.pairs, rotary.start, self.renditions, step)
        made: tuple[First | Refinement | Quantiser, ...] = (*self.firsts, *self.refinements, self.detail)
        coders = [_coder(coder.classes, coder.tables) for coder in made]
        numbers = (self.reach.astype("<u2").tobytes(), rotary.frequencies.astype("<f4").tobytes())
        return b"".join((head, *numbers, *(basis.pack() for basis in self.bases), *coders))


def read(reader: Reader, shape: tuple[int, int, int, int]) -> TransformProfile:
    """What `TransformProfile.data` wrote, for KV of layers, planes, kv_heads, head_dim; raises ValueError."""
    layers, planes, heads, dim = shape
    count, pairs, start, renditions, step = reader.fields(_HEAD)
    if count != planes or start + 2 * pairs > dim or not 1 <= renditions <= MAX_RENDITIONS:
        raise ValueError(f"{count} planes, pairs {start} + {pairs}, {renditions} renditions")
    reach = reader.array("<u2", renditions, planes)
    frequencies = reader.array("<f4", layers, pairs)
    if not (np.abs(frequencies) < 1e6).all():
        raise ValueError("a frequency is not usable")
    read_bases = tuple(bases.read(reader, layers * heads, dim) for _ in range(planes))
    rank = sum(basis.rank for basis in read_bases)
    firsts = tuple(First(*_read_coder(reader, 1, rank)) for _ in range(renditions))
    refinements = tuple(Refinement(*_read_coder(reader, CONTEXTS, rank)) for _ in range(renditions - 1))
    blocks, columns = layers * planes, heads * dim
    classes, tables = _read_coder(reader, 1, blocks, columns)
    zeros = np.zeros((blocks, columns), np.float32)
    detail = Quantiser(zeros, np.full(blocks, step, np.float32), classes, tables)
    return TransformProfile(Rotary(frequencies, start), read_bases, reach, firsts, refinements, detail)


def _coder(classes: Array, tables: Tables) -> bytes:
    arrays = (classes.astype("u1"), tables.frequencies)
    return pair(tables.classes, tables.symbols) + b"".join(array.tobytes() for array in arrays)


def _read_coder(reader: Reader, contexts: int, *shape: int) -> tuple[Array, Tables]:
    """Classes, each of as many tables as there are contexts, and the tables."""
    count, symbols = reader.pair()
    classes = reader.array("u1", *shape).astype("<u2")
    if count % contexts:
        raise ValueError(f"{count} tables for {contexts} contexts")
    return classes, Tables(reader.array("<u2", count, symbols))
