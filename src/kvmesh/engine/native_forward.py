"""The forward pass of a plain Llama in one call of the native library: no operation of torch's between two layers.

At small batches starting operations costs more than computing them. Takes models whose products are all native, with
attention by the native kernel: anything else is computed operation by operation (`EagerForward`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from kvmesh.engine.attention.interface import Attention, Segment
from kvmesh.engine.attention.native import NativeAttention
from kvmesh.engine.linear.native import Matrix, NativeProduct
from kvmesh.engine.models.feed_forward import GatedFeedForward
from kvmesh.engine.models.llama import Decoder, LayerWeights
from kvmesh.engine.models.rope import inverse_frequencies

Products = tuple[NativeProduct, NativeProduct, NativeProduct, NativeProduct]


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("window", ctypes.c_int32),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("amplitude", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


def products_of(layer: LayerWeights) -> Products | None:
    """Those of a layer that has nothing but what a Llama's has, if all of them are native."""
    more = (layer.q_norm, layer.k_norm, layer.attention_post_norm, layer.mlp_post_norm)
    feed_forward = layer.feed_forward
    if not isinstance(feed_forward, GatedFeedForward) or feed_forward.activation != "silu" or more != (None,) * 4:
        return None
    products = (layer.qkv, layer.output, feed_forward.gate_up, feed_forward.down)
    return products if all(isinstance(product, NativeProduct) for product in products) else None  # type: ignore


class NativeForward:
    """Implements `Forward`."""

    def __init__(self, model: Decoder, attention: NativeAttention, products: Sequence[Products]) -> None:
        config, rope = model.config, model.config.rope
        self._model, self._attention = model, attention
        attention.share_between(config.heads // config.kv_heads)
        norms = [(layer.attention_norm.float(), layer.mlp_norm.float()) for layer in model.weights.layers]
        self._frequencies = inverse_frequencies(rope, config.rotary_dim).contiguous()
        layers = (_Layer * len(norms))(
            *(
                _Layer(*(norm.data_ptr() for norm in pair), *(product.matrix for product in four), window or 0)
                for pair, four, window in zip(norms, products, model.windows, strict=True)
            )
        )
        self._kept = (norms, products)
        shape = (len(norms), config.hidden_size, config.heads, rope.amplitude, config.norm_eps)
        struct = _Model(ctypes.addressof(layers), self._frequencies.data_ptr(), *shape)
        library = products[0][0].products.library
        pointer = ctypes.c_void_p
        library.kvmesh_llama_create.argtypes, library.kvmesh_llama_create.restype = (pointer,), pointer
        library.kvmesh_llama_destroy.argtypes, library.kvmesh_llama_destroy.restype = (pointer,), None
        self._run = library.kvmesh_llama_run
        self._run.argtypes, self._run.restype = (pointer,) * 6, None
        self._crew = products[0][0].products
        self._handle = library.kvmesh_llama_create(ctypes.addressof(struct))
        self._close = weakref.finalize(self, library.kvmesh_llama_destroy, self._handle)

    def __call__(self, token_ids: Sequence[int], positions: Sequence[int], segments: Sequence[Segment]) -> Tensor:
        self._attention.plan(segments)
        states = self._model.embed(torch.tensor(token_ids, dtype=torch.int64)).contiguous()
        self._run(self._handle, self._crew.crew, *self._attention.addresses, states.data_ptr())
        return states


def native_forward(model: Decoder, attention: Attention) -> NativeForward | None:
    """For a model that it takes."""
    config = model.config
    plain = type(model) is Decoder and config.experts is None and config.rotary_dim == config.head_dim
    if not plain or config.local_rope or model.dtype != torch.bfloat16 or not isinstance(attention, NativeAttention):
        return None
    products = [products_of(layer) for layer in model.weights.layers]
    return NativeForward(model, attention, products) if all(products) else None  # type: ignore[arg-type]
