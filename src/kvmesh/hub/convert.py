"""Turns a GGUF file into a Hugging Face folder. Knows neither downloads nor the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvmesh.errors import Unavailable
from kvmesh.hub.progress import Progress


def convert(source: Path, folder: Path, progress: Progress) -> None:
    """Fills `folder` from the GGUF file `source`.

    Raises:
        InvalidArgument: an architecture, vocabulary or quantisation type that is not supported.
    """
    try:
        from kvmesh.hub.gguf_config import config_of, special_ids
        from kvmesh.hub.gguf_file import GgufFile
        from kvmesh.hub.gguf_tokenizer import tokenizer_config_of, tokenizer_of
        from kvmesh.hub.gguf_weights import write_weights
    except ImportError as error:
        raise Unavailable(f"converting GGUF files needs the package {error.name}: install kvmesh[hub]") from None
    progress(f"Reading {source.name}", 0, None)
    file = GgufFile(source)
    _write(folder / "config.json", config_of(file))
    _write(folder / "generation_config.json", special_ids(file))
    _write(folder / "tokenizer_config.json", tokenizer_config_of(file))
    tokenizer_of(file).save(str(folder / "tokenizer.json"))
    write_weights(file, folder / "model.safetensors", progress)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
