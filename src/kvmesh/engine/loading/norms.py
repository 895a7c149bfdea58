"""The norms of a layer, by their Hugging Face names. Knows no projection.

Gemma stores the distance of a norm's weight from 1. The sum needs more digits than bfloat16 has, so it stays float32.
"""

from __future__ import annotations

from torch import Tensor

from kvmesh.engine.loading.tensors import TensorFolder
from kvmesh.engine.models.config import DecoderConfig


def load_norms(tensors: TensorFolder, config: DecoderConfig, index: int) -> dict[str, Tensor]:
    """Norms of a layer, under the names of `LayerWeights`."""
    prefix = f"model.layers.{index}"
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.sandwich:
        names["attention_post_norm"] = "post_attention_layernorm"
        names |= {"mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    norms = {ours: load_norm(tensors, config, f"{prefix}.{name}", config.hidden_size) for ours, name in names.items()}
    return norms | _qk_norms(tensors, config, f"{prefix}.self_attn")


def load_norm(tensors: TensorFolder, config: DecoderConfig, name: str, size: int) -> Tensor:
    """A norm's weight as it multiplies."""
    weight = tensors.get(f"{name}.weight", size)
    return weight.float() + config.norm_offset if config.norm_offset else weight


def _qk_norms(tensors: TensorFolder, config: DecoderConfig, prefix: str) -> dict[str, Tensor]:
    """Norms of queries and keys; rotation is linear, so the query's takes on `query_scale` for free."""
    if config.qk_norm is None:
        return {}
    heads = (config.heads, config.kv_heads) if config.qk_norm == "width" else (1, 1)
    q = load_norm(tensors, config, f"{prefix}.q_norm", heads[0] * config.head_dim)
    k = load_norm(tensors, config, f"{prefix}.k_norm", heads[1] * config.head_dim)
    return {"q_norm": q if config.query_scale == 1 else q * config.query_scale, "k_norm": k}
