"""The weights of latent attention, by their Hugging Face names, with what attention need not do then done here.

Rotary pairs that are neighbours move half a head apart: the same permutation of queries and keys, which no score sees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvmesh.engine.loading.feed_forward import Fuse
from kvmesh.engine.loading.tensors import TensorFolder
from kvmesh.engine.models.config import DecoderConfig
from kvmesh.engine.models.latent_config import Latent


def open_tensors(path: Path, dtype: torch.dtype, device: torch.device | str, config: DecoderConfig) -> TensorFolder:
    """The tensors of a model, rotary rows in the order that the decoder expects."""
    if config.latent is None or not config.latent.interleaved:
        return TensorFolder(path, dtype, device)
    return Deinterleaved(path, dtype, device, config.latent)


def load_latent_attention(tensors: TensorFolder, config: DecoderConfig, index: int, fuse: Fuse) -> dict[str, Any]:
    """The fields of `LatentLayerWeights` that attention uses."""
    assert config.latent is not None
    latent, hidden, prefix = config.latent, config.hidden_size, f"model.layers.{index}.self_attn"
    width = config.heads * latent.head_dim
    query = {f"{prefix}.q_proj": width} if latent.query_rank is None else {f"{prefix}.q_a_proj": latent.query_rank}
    fields = {
        "qkv": fuse({**query, f"{prefix}.kv_a_proj_with_mqa": latent.entry_dim}, hidden, False),
        "output": fuse({f"{prefix}.o_proj": hidden}, config.heads * latent.value_dim, False),
        "latent_norm": tensors.get(f"{prefix}.kv_a_layernorm.weight", latent.rank),
        **_expansions(tensors, config, latent, f"{prefix}.kv_b_proj.weight"),
    }
    if latent.query_rank is not None:
        fields["query_norm"] = tensors.get(f"{prefix}.q_a_layernorm.weight", latent.query_rank)
        fields["query_up"] = fuse({f"{prefix}.q_b_proj": width}, latent.query_rank, False)
    return fields


def _expansions(tensors: TensorFolder, config: DecoderConfig, latent: Latent, name: str) -> dict[str, Tensor]:
    rows = latent.nope_dim + latent.value_dim
    expand = tensors.get(name, config.heads * rows, latent.rank).view(config.heads, rows, latent.rank)
    key_up, value_up = expand[:, : latent.nope_dim], expand[:, latent.nope_dim :]
    return {"key_up": key_up.contiguous(), "value_up": value_up.transpose(1, 2).contiguous()}


class Deinterleaved(TensorFolder):
    """Tensors of which the rotary rows of queries and keys are in halves instead of neighbouring pairs."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device | str, latent: Latent) -> None:
        super().__init__(path, dtype, device)
        self._rows = {
            "q_proj": latent.head_dim,
            "q_b_proj": latent.head_dim,
            "kv_a_proj_with_mqa": latent.entry_dim,
        }
        self._rope_dim = latent.rope_dim

    def get(self, name: str, *shape: int) -> Tensor:
        tensor = super().get(name, *shape)
        rows = self._rows.get(name.split(".")[-2])
        return tensor if rows is None else _halves(tensor, rows, self._rope_dim)


def _halves(weight: Tensor, head_rows: int, rope_dim: int) -> Tensor:
    """Reorders the last `rope_dim` of each `head_rows` rows: even ones first."""
    heads = weight.view(-1, head_rows, weight.shape[-1]).clone()
    rotary = heads[:, head_rows - rope_dim :].clone()
    heads[:, head_rows - rope_dim :] = rotary.view(len(heads), -1, 2, weight.shape[-1]).transpose(1, 2).flatten(1, 2)
    return heads.view(weight.shape)
