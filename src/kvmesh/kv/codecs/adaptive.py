"""Several codecs in one namespace: KV as it is where links are fast, and ever smaller where they are slower.

Each bitstream says which it is; who encodes chooses. The namespace is a lossy one whatever is chosen: a chunk of it may
have been lossy once. Knows no link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kvmesh.kv.codec import CODECS, Buffer, Codec, CorruptChunk, Format, KvArray, Shape

VERSION = 1


@dataclass(frozen=True, slots=True)
class Adaptive:
    """`members`: an exact one, then ever smaller ones; the last encodes unless another is chosen.

    `profile`: the hash of what they were calibrated with.
    """

    members: tuple[Codec, ...]
    profile: str

    @property
    def format(self) -> Format:
        return self.members[-1].format

    @property
    def namespace(self) -> str:
        return f"adaptive/{VERSION}:{self.profile}"

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> Sequence[Buffer]:
        return self.members[-1].encode(data, first_layer, start)

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        return self.members[-1].decode(parts, shape, dtype, first_layer)


@dataclass(frozen=True)
class Later:
    """A codec that is made on its first use: what may never be needed costs nothing."""

    format: Format
    namespace: str
    make: Callable[[], Codec]

    def encode(self, data: KvArray, first_layer: int, start: int = 0) -> Sequence[Buffer]:
        return self._codec.encode(data, first_layer, start)

    def decode(self, parts: Sequence[memoryview], shape: Shape, dtype: np.dtype[Any], first_layer: int) -> KvArray:
        return self._codec.decode(parts, shape, dtype, first_layer)

    @cached_property
    def _codec(self) -> Codec:
        return self.make()


def member(codec: Codec, format_id: int) -> Codec:
    """The one to decode a bitstream of `format_id` with.

    Raises:
        CorruptChunk: a codec that is not among the adaptive one's.
    """
    if not isinstance(codec, Adaptive):
        return codec
    for each in codec.members:
        if each.format.id == format_id:
            return each
    names = ", ".join(each.format.name for each in codec.members)
    raise CorruptChunk(f"encoded by {CODECS[format_id].name} where one of {names} is due")
