"""Reading a file of a profile, front to back. numpy and struct refuse what is not there, so no length is believed."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

_PAIR = struct.Struct("<2H")


class Reader:
    """Raises ValueError or struct.error where the content ends too early."""

    def __init__(self, content: bytes, offset: int = 0) -> None:
        self._content = content
        self._offset = offset

    @property
    def done(self) -> bool:
        return self._offset == len(self._content)

    def fields(self, layout: struct.Struct) -> tuple[Any, ...]:
        values = layout.unpack_from(self._content, self._offset)
        self._offset += layout.size
        return values

    def pair(self) -> tuple[int, int]:
        first, second = self.fields(_PAIR)
        return first, second

    def array(self, dtype: str, *shape: int) -> npt.NDArray[Any]:
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(self._content, dtype, count, self._offset).reshape(shape)
        self._offset += array.nbytes
        return array


def pair(first: int, second: int) -> bytes:
    """What `Reader.pair` reads."""
    return _PAIR.pack(first, second)
