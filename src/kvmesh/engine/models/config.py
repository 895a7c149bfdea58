"""The shape of a decoder, read from a Hugging Face `config.json`.

Knows the families Llama (SmolLM2 included), Mistral, Qwen2 and Qwen3. Knows no tensor and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmesh.errors import InvalidArgument

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), rotating halves; scaling as transformers names it."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A Llama-like decoder. `windows` has one entry per layer: how many keys a query sees, itself included, or None."""

    family: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary_size: int
    max_model_len: int
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads `config.json`.

    Raises:
        InvalidArgument: a family, activation or RoPE type that is not supported, or a missing or inconsistent field.
    """
    family = config.get("model_type", "")
    if family not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise InvalidArgument(f"the model architecture {family!r} is not supported; supported are {supported}")
    try:
        return _check(_parse(family, config))
    except KeyError as error:
        raise InvalidArgument(f"config.json lacks the field {error.args[0]!r}") from None


def _parse(family: str, config: Mapping[str, Any]) -> DecoderConfig:
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise InvalidArgument(f"the activation {activation!r} is not supported; supported is silu")
    heads = config["num_attention_heads"]
    biased = bool(config.get("attention_bias", False))
    return DecoderConfig(
        family=family,
        layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary_size=config["vocab_size"],
        max_model_len=config["max_position_embeddings"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=_rope(config),
        windows=_windows(family, config),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=biased or family == "qwen2",
        output_bias=biased and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
    )


def _check(config: DecoderConfig) -> DecoderConfig:
    if config.heads % config.kv_heads:
        raise InvalidArgument(f"{config.heads} query heads cannot share {config.kv_heads} KV heads evenly")
    if config.head_dim % 2:
        raise InvalidArgument(f"the head dimension {config.head_dim} is odd, which RoPE cannot rotate")
    return config


def _rope(config: Mapping[str, Any]) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise InvalidArgument(f"the RoPE type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InvalidArgument("rotating only a part of each head (partial_rotary_factor) is not supported")
    return Rope(
        theta=float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_context=int(
            scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
        ),
    )  # fmt: skip


def _windows(family: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers: int = config["num_hidden_layers"]
    window: int | None = config.get("sliding_window")
    if family == "mistral":
        return (window,) * layers
    if family == "llama" or not window or not config.get("use_sliding_window", False):
        return (None,) * layers
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    full = config.get("max_window_layers", layers)
    return tuple(None if layer < full else window for layer in range(layers))
