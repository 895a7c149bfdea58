"""Reads a GGUF file: metadata by key, tensors as numpy arrays in the type that they keep. Knows no architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize

from kvmesh.errors import InvalidArgument

Array = np.ndarray[Any, np.dtype[Any]]

SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A stored tensor; `shape` is row-major, as torch has it."""

    name: str
    shape: tuple[int, ...]
    kind: str
    _raw: Any

    @property
    def dtype(self) -> str:
        """The safetensors type it is converted to: 16-bit floats stay, quantised ones become F32."""
        return self.kind if self.kind in ("F16", "BF16") else "F32"

    def load(self) -> Array:
        """Dequantised values: float32 or float16, or the uint16 bit patterns of bfloat16."""
        if self.kind == "BF16":
            return np.ascontiguousarray(self._raw.data).view(np.uint16).reshape(self.shape)
        if self.kind == "F16":
            return np.asarray(self._raw.data).reshape(self.shape)
        return dequantize(self._raw.data, self._raw.tensor_type).reshape(self.shape).astype(np.float32, copy=False)


class GgufFile:
    """An open GGUF file.

    Raises:
        InvalidArgument: it is not GGUF, or it holds a quantisation type that is not supported.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise InvalidArgument(f"{path} is not a readable GGUF file: {error}") from None
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors}
        if unknown := sorted(kinds.difference(SUPPORTED)):
            raise InvalidArgument(
                f"{path} holds tensors of type {', '.join(unknown)}; supported are {', '.join(SUPPORTED)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value: a string, number, bool or list."""
        field = self._reader.get_field(key)
        if field is None:
            return default
        if field.types[0] == GGUFValueType.ARRAY and not len(field.data):
            return []
        return field.contents()

    def require(self, key: str) -> Any:
        """As `get`.

        Raises:
            InvalidArgument: there is no such key.
        """
        if (value := self.get(key)) is None:
            raise InvalidArgument(f"the GGUF file lacks the metadata {key}")
        return value

    @cached_property
    def architecture(self) -> str:
        return str(self.require("general.architecture"))

    def hyperparameter(self, key: str, default: Any = None) -> Any:
        """Metadata under the architecture's prefix; required if no default is given."""
        name = f"{self.architecture}.{key}"
        return self.require(name) if default is None else self.get(name, default)

    @cached_property
    def tensors(self) -> dict[str, GgufTensor]:
        return {tensor.name: tensor for tensor in self._tensors()}

    def _tensors(self) -> Iterator[GgufTensor]:
        for raw in self._reader.tensors:
            shape = tuple(int(size) for size in reversed(raw.shape))
            yield GgufTensor(raw.name, shape, raw.tensor_type.name, raw)
