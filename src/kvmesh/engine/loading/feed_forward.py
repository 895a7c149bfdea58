"""The feed-forward of a layer, dense or a mixture of experts, by its Hugging Face names. Knows no attention."""

from __future__ import annotations

from collections.abc import Callable

from kvmesh.engine.linear import Dense, Linear
from kvmesh.engine.loading.tensors import TensorFolder
from kvmesh.engine.models.config import DecoderConfig
from kvmesh.engine.models.expert_config import Experts
from kvmesh.engine.models.feed_forward import FeedForward, GatedFeedForward
from kvmesh.engine.models.fused import Fused
from kvmesh.engine.models.moe import MixtureOfExperts, Router

Fuse = Callable[[dict[str, int], int, bool], Linear]
"""(rows of each tensor by name, columns, biased) -> one projection with the rows of all."""

_LLAMA = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")


def load_feed_forward(
    tensors: TensorFolder, config: DecoderConfig, index: int, fuse: Fuse, fused: Fused
) -> FeedForward:
    """The feed-forward of layer `index`."""
    prefix, experts = f"model.layers.{index}", config.experts
    if experts is None or not experts.sparse[index]:
        return _gated(fuse, fused, config, f"{prefix}.mlp", _LLAMA, config.intermediate_size)
    mixtral = config.family == "mixtral"
    block = f"{prefix}.block_sparse_moe" if mixtral else f"{prefix}.mlp"
    names, size = _MIXTRAL if mixtral else _LLAMA, experts.intermediate_size
    return MixtureOfExperts(
        router=_router(tensors, config, experts, f"{block}.gate"),
        experts=[
            _gated(fuse, fused, config, f"{block}.experts.{expert}", names, size) for expert in range(experts.count)
        ],
        shared=_shared(fuse, fused, config, experts, block),
        shared_gate=_shared_gate(tensors, config, experts, block),
    )


def _gated(
    fuse: Fuse, fused: Fused, config: DecoderConfig, prefix: str, names: tuple[str, str, str], size: int
) -> GatedFeedForward:
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return GatedFeedForward(
        gate_up=fuse({gate: size, up: size}, config.hidden_size, config.mlp_bias),
        down=fuse({down: config.hidden_size}, size, config.mlp_bias),
        fused=fused,
        activation=config.activation,
    )


def _shared(fuse: Fuse, fused: Fused, config: DecoderConfig, experts: Experts, block: str) -> FeedForward | None:
    if not experts.shared_size:
        return None
    name = "shared_expert" if experts.shared_gated else "shared_experts"
    return _gated(fuse, fused, config, f"{block}.{name}", _LLAMA, experts.shared_size)


def _shared_gate(tensors: TensorFolder, config: DecoderConfig, experts: Experts, block: str) -> Linear | None:
    """One row, so never worth packing."""
    if not experts.shared_gated:
        return None
    return Dense(tensors.get(f"{block}.shared_expert_gate.weight", 1, config.hidden_size))


def _router(tensors: TensorFolder, config: DecoderConfig, experts: Experts, prefix: str) -> Router:
    bias = tensors.get(f"{prefix}.e_score_correction_bias", experts.count) if experts.routing.biased else None
    weight = tensors.get(f"{prefix}.weight", experts.count, config.hidden_size)
    return Router(weight.float(), experts.routing, None if bias is None else bias.float())
