"""Assembles a decoder from a model folder: which tensor goes where, and which are fused.

Names are those of Hugging Face. Knows no attention and no KV. Feed-forwards, norms and latent attention have files of
their own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kvmesh.engine.linear import Linear, Packing, packing_of
from kvmesh.engine.loading.feed_forward import load_feed_forward
from kvmesh.engine.loading.latent import load_latent_attention, open_tensors
from kvmesh.engine.loading.norms import load_norm, load_norms
from kvmesh.engine.loading.projections import Projections
from kvmesh.engine.loading.ranges import activation_ranges
from kvmesh.engine.loading.tensors import TensorFolder
from kvmesh.engine.models.config import DecoderConfig, parse
from kvmesh.engine.models.fused import Fused, fused_for
from kvmesh.engine.models.llama import Decoder, DecoderWeights, LayerWeights
from kvmesh.engine.models.mla import LatentDecoder, LatentLayerWeights
from kvmesh.errors import InvalidArgument
from kvmesh.hub import ModelFolder

DTYPES = ("float32", "bfloat16", "float16")
_EMBEDDING = "model.embed_tokens.weight"


def load(
    folder: ModelFolder,
    dtype: str,
    device: str = "cpu",
    layers: tuple[int, int] | None = None,
    precision: str = "float32",
    packing: Packing | None = None,
) -> Decoder:
    """Loads layers [first, end) of a model, all by default; `precision` is a resolved one of `engine.linear`.

    `packing` is by default what that precision is on this machine.

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
    tensors = open_tensors(folder.path, getattr(torch, dtype), device, config)
    packing = packing or packing_of(precision, device)
    matrices = tensors if packing.dense else open_tensors(folder.path, torch.float32, device, config)
    fused = fused_for(tensors.dtype, device)

    def assemble(projections: Projections, first: int, end: int) -> Decoder:
        weights = _weights(tensors, projections, config, first, end, fused)
        return (LatentDecoder if config.latent else Decoder)(config, weights, tensors.dtype, first, fused)

    whole = partial(assemble, first=0, end=config.layers)
    ranges = activation_ranges(folder, tensors, whole) if packing.ranged else {}
    return assemble(Projections(matrices, packing, ranges), first, end)


def _weights(
    tensors: TensorFolder, projections: Projections, config: DecoderConfig, first: int, end: int, fused: Fused
) -> DecoderWeights:
    last = end == config.layers
    vocabulary = (config.vocabulary_size, config.hidden_size)
    embedding = tensors.get(_EMBEDDING, *vocabulary) if first == 0 or (last and config.tied) else None
    return DecoderWeights(
        layers=tuple(_layer(tensors, projections, config, index, fused) for index in range(first, end)),
        embedding=embedding if first == 0 else None,
        norm=load_norm(tensors, config, "model.norm", config.hidden_size) if last else None,
        head=_head(projections, embedding if config.tied else None, vocabulary) if last else None,
    )


def _head(projections: Projections, tied: Tensor | None, shape: tuple[int, int]) -> Linear:
    if tied is None:
        return projections.head("lm_head.weight", *shape)
    return projections.tied_head(tied, _EMBEDDING)


def _layer(
    tensors: TensorFolder, projections: Projections, config: DecoderConfig, index: int, fused: Fused
) -> LayerWeights:
    attention, norms = f"model.layers.{index}.self_attn", load_norms(tensors, config, index)
    feed_forward = load_feed_forward(tensors, config, index, projections.fused, fused)
    if config.latent:
        latent = load_latent_attention(tensors, config, index, projections.fused)
        return LatentLayerWeights(feed_forward=feed_forward, **(latent | norms))
    width, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
    qkv = {f"{attention}.q_proj": width, f"{attention}.k_proj": narrow, f"{attention}.v_proj": narrow}
    return LayerWeights(
        qkv=projections.fused(qkv, config.hidden_size, config.qkv_bias),
        output=projections.fused({f"{attention}.o_proj": config.hidden_size}, width, config.output_bias),
        feed_forward=feed_forward,
        **norms,
    )
