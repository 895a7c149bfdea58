"""Rotary position embedding as `config.json` describes it. Knows no tensor.

Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before). Papers: RoFormer (arXiv
2104.09864), YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmesh.errors import InvalidArgument

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """RoPE that rotates halves; scaling as transformers names it. Cosines and sines are multiplied by `amplitude`."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0


def read_rope(config: Mapping[str, Any]) -> Rope:
    """The only RoPE of a model.

    Raises:
        InvalidArgument: a kind of RoPE that is not supported.
        KeyError: a missing field.
    """
    return _read(config.get("rope_parameters") or config.get("rope_scaling") or {}, config, config.get("rope_theta"))


def read_ropes(config: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """The RoPE of layers that see everything, and of those with a sliding window (Gemma 3); raises as `read_rope`."""
    kinds = config.get("rope_parameters") or {}
    if "full_attention" in kinds:
        return _read(kinds["full_attention"], config, None), _read(kinds["sliding_attention"], config, None)
    scaled = _read(kinds or config.get("rope_scaling") or {}, config, config.get("rope_theta") or 1e6)
    return scaled, _read({}, config, config.get("rope_local_base_freq") or 10000.0)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature: by how much attention over a context stretched `factor` times is sharpened."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def scaling_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of RoPE scaling, empty without any."""
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return scaling if _kind(scaling) != "default" else {}


def _kind(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _read(scaling: Mapping[str, Any], config: Mapping[str, Any], theta: float | None) -> Rope:
    if (kind := _kind(scaling)) not in ROPE_TYPES:
        raise InvalidArgument(f"the RoPE type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InvalidArgument("rotating only a part of each head (partial_rotary_factor) is not supported")
    original = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = scaling.get("factor") or (config["max_position_embeddings"] / original if kind == "yarn" else 1.0)
    return Rope(
        theta=float(scaling.get("rope_theta") or theta or 10000.0),
        kind=kind,
        factor=float(factor),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_context=int(original),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        truncate=bool(scaling.get("truncate", True)),
        amplitude=_amplitude(kind, scaling, float(factor)),
    )


def _amplitude(kind: str, scaling: Mapping[str, Any], factor: float) -> float:
    if kind != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return yarn_mscale(factor)
