"""What bench/gpu.py measures with: a model of Llama-3-8B's shape, and the device's own limits. Needs a CUDA device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvmesh.engine.linear import Dense
from kvmesh.engine.models.config import parse
from kvmesh.engine.models.feed_forward import GatedFeedForward
from kvmesh.engine.models.fused import fused_for
from kvmesh.engine.models.llama import Decoder, DecoderWeights, LayerWeights

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def random_decoder(shape: dict[str, Any], device: str, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """A model of this shape, its weights small enough that nothing overflows."""
    config, generator = parse(shape), torch.Generator(device).manual_seed(0)
    hidden, fused = config.hidden_size, fused_for(dtype, device)

    def dense(rows: int, columns: int) -> Dense:
        weight = torch.empty(rows, columns, dtype=dtype, device=device)
        return Dense(weight.normal_(0.0, columns**-0.5, generator=generator))

    def norm() -> torch.Tensor:
        return torch.ones(hidden, dtype=dtype, device=device)

    def layer() -> LayerWeights:
        qkv = dense((config.heads + 2 * config.kv_heads) * config.head_dim, hidden)
        gate_up, down = dense(2 * config.intermediate_size, hidden), dense(hidden, config.intermediate_size)
        output = dense(hidden, config.heads * config.head_dim)
        return LayerWeights(norm(), qkv, output, norm(), GatedFeedForward(gate_up, down, fused))

    head = dense(config.vocabulary_size, hidden)
    layers = tuple(layer() for _ in range(config.layers))
    weights = DecoderWeights(layers, dense(config.vocabulary_size, hidden).weight, norm(), head)
    return Decoder(config, weights, dtype, 0, fused)


def layer_weights(model: Decoder) -> Iterator[torch.Tensor]:
    """The matrices of all layers."""
    for layer in model.weights.layers:
        assert isinstance(layer.feed_forward, GatedFeedForward)
        for product in (layer.qkv, layer.output, layer.feed_forward.gate_up, layer.feed_forward.down):
            assert isinstance(product, Dense)
            yield product.weight


def weight_bytes(model: Decoder) -> int:
    """What a step reads of the weights: all but the embedding."""
    assert isinstance(model.weights.head, Dense)
    return sum(weight.nbytes for weight in layer_weights(model)) + model.weights.head.weight.nbytes


def copy_rate(device: str) -> float:
    """Bytes read and written per second by the device's own copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def matrix_rate(device: str) -> float:
    """Operations per second of a bfloat16 product of 8,192 by 8,192."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    return 2 * 8192**3 / median_seconds(lambda: a @ a)


def median_seconds(compute: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
    """Of a call that is over when the device is idle."""
    taken = []
    for _ in range(warm + repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        compute()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[warm:])
