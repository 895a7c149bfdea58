"""Sliding windows of a model's layers, read from `config.json`: each family says it in its own way. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """How many keys a query of each layer sees, itself included, or None; raises KeyError for a missing field."""
    family, layers = str(config["model_type"]), int(config["num_hidden_layers"])
    window: int | None = config.get("sliding_window")
    if family == "gemma3_text":
        return _alternating(layers, window, config)
    if family in ("mistral", "mixtral"):
        return (window,) * layers
    if not family.startswith("qwen") or not window or not config.get("use_sliding_window", False):
        return (None,) * layers
    if family == "qwen3_moe":
        return (window,) * layers
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    full = config.get("max_window_layers", layers)
    return tuple(None if layer < full else window for layer in range(layers))


def _alternating(layers: int, window: int | None, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Gemma 3: every sixth layer sees everything, unless the file says otherwise."""
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    types = config.get("layer_types") or [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in types)
