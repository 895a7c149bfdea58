"""Named tensors of a safetensors folder, one file or sharded, memory-mapped. Knows no architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvmesh.errors import InvalidArgument, NotFound


class TensorFolder:
    """Looks tensors up by name across the files of a folder and converts them to `dtype` on `device`."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.dtype = dtype
        self._device = device
        self._files: dict[str, Any] = {}
        for file in weight_files(path):
            try:
                handle: Any = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InvalidArgument(f"{file} is not a readable safetensors file: {error}") from None
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, *shape: int) -> Tensor:
        """The tensor, of exactly this shape.

        Raises:
            InvalidArgument: it is missing or of another shape.
        """
        if name not in self._files:
            raise InvalidArgument(f"the weights lack the tensor {name}")
        tensor: Tensor = self._files[name].get_tensor(name)
        if tensor.shape != shape:
            raise InvalidArgument(f"the tensor {name} has shape {tuple(tensor.shape)} instead of {shape}")
        return tensor.to(self._device, self.dtype)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, those of the index if there is one.

    Raises:
        NotFound: there is none, or one that the index names is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = sorted(path.glob("*.safetensors"))
    if missing := [file.name for file in files if not file.exists()]:
        raise NotFound(f"{path} lacks the weight files {', '.join(missing)}")
    if not files:
        raise NotFound(f"{path} holds no .safetensors file")
    return files
