"""Assembles a decoder from a model folder: which tensor goes where, and which are fused.

Names are those of Hugging Face's Llama, Mistral, Qwen2 and Qwen3. Knows no attention and no KV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmesh.engine.loading.tensors import TensorFolder
from kvmesh.engine.models.config import DecoderConfig, parse
from kvmesh.engine.models.llama import Decoder, DecoderWeights, LayerWeights, Linear
from kvmesh.errors import InvalidArgument
from kvmesh.hub import ModelFolder

DTYPES = ("float32", "bfloat16", "float16")


def load(folder: ModelFolder, dtype: str, device: str = "cpu", layers: tuple[int, int] | None = None) -> Decoder:
    """Loads layers [first, end) of a model, all by default.

    Raises:
        InvalidArgument: an unsupported architecture or dtype, or tensors that do not fit `config.json`.
        NotFound: weight files are missing.
    """
    if dtype not in DTYPES:
        raise InvalidArgument(f"the dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    config = parse(folder.config)
    first, end = layers or (0, config.layers)
    if not 0 <= first < end <= config.layers:
        raise InvalidArgument(f"the layers [{first}, {end}) are not within the model's {config.layers}")
    tensors = TensorFolder(folder.path, getattr(torch, dtype), device)
    return Decoder(config, _weights(tensors, config, first, end), first)


def _weights(tensors: TensorFolder, config: DecoderConfig, first: int, end: int) -> DecoderWeights:
    last = end == config.layers
    embedding = _embedding(tensors, config) if first == 0 or (last and config.tied) else None
    head = embedding if config.tied else _head(tensors, config) if last else None
    return DecoderWeights(
        layers=tuple(_layer(tensors, config, index) for index in range(first, end)),
        embedding=embedding if first == 0 else None,
        norm=tensors.get("model.norm.weight", config.hidden_size) if last else None,
        head=Linear(head) if last and head is not None else None,
    )


def _embedding(tensors: TensorFolder, config: DecoderConfig) -> Tensor:
    return tensors.get("model.embed_tokens.weight", config.vocabulary_size, config.hidden_size)


def _head(tensors: TensorFolder, config: DecoderConfig) -> Tensor:
    return tensors.get("lm_head.weight", config.vocabulary_size, config.hidden_size)


def _layer(tensors: TensorFolder, config: DecoderConfig, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}"
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.heads * config.head_dim
    narrow = config.kv_heads * config.head_dim
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    qkv = {f"{attention}.q_proj": width, f"{attention}.k_proj": narrow, f"{attention}.v_proj": narrow}
    return LayerWeights(
        attention_norm=tensors.get(f"{prefix}.input_layernorm.weight", hidden),
        qkv=_fused(tensors, qkv, hidden, config.qkv_bias),
        output=_fused(tensors, {f"{attention}.o_proj": hidden}, width, config.output_bias),
        mlp_norm=tensors.get(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=_fused(tensors, {f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}, hidden, config.mlp_bias),
        down=_fused(tensors, {f"{mlp}.down_proj": hidden}, inner, config.mlp_bias),
        q_norm=tensors.get(f"{attention}.q_norm.weight", config.head_dim) if config.qk_norm else None,
        k_norm=tensors.get(f"{attention}.k_norm.weight", config.head_dim) if config.qk_norm else None,
    )


def _fused(tensors: TensorFolder, outputs: dict[str, int], inputs: int, biased: bool) -> Linear:
    """Stacks projections {name: rows} of one input into one matrix product."""
    weight = [tensors.get(f"{name}.weight", rows, inputs) for name, rows in outputs.items()]
    bias = [tensors.get(f"{name}.bias", rows) for name, rows in outputs.items()] if biased else []
    return Linear(_stack(weight), _stack(bias) if bias else None)


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
