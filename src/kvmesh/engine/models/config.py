"""The shape of a decoder, read from a Hugging Face `config.json`.

Knows the families Llama (SmolLM2 included), Mistral, Qwen2, Qwen3 and Gemma 3, those with experts, and DeepSeek.
Knows no tensor and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvmesh.engine.models import expert_config, latent_config
from kvmesh.engine.models.expert_config import Experts, read_experts
from kvmesh.engine.models.latent_config import Latent, read_latent
from kvmesh.engine.models.rope_config import Rope, read_rope, read_ropes
from kvmesh.engine.models.window_config import read_windows
from kvmesh.errors import InvalidArgument

DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
FAMILIES = (*DENSE_FAMILIES, *dict.fromkeys((*expert_config.FAMILIES, *latent_config.FAMILIES)))
_ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_QK_NORMS: Mapping[str, Literal["head", "width"]] = {
    "qwen3": "head", "qwen3_moe": "head", "gemma3_text": "head", "olmoe": "width",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A Llama-like decoder. `windows` has one entry per layer: how many keys a query sees, itself included, or None.

    `qk_norm`: queries and keys are normalised per head, or over the width of all heads. `sandwich`: what attention and
    feed-forward return is normalised too. `norm_offset` is added to the weights of norms. `query_scale`: what queries
    are multiplied by before scores are divided by sqrt(head_dim). `local_rope`: of layers with a window, if it differs.
    With a `latent`, `kv_heads` and `head_dim` are those of the cache: one head of latent and position.
    """

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
    qk_norm: Literal["head", "width"] | None
    activation: Literal["silu", "gelu_tanh"] = "silu"
    sandwich: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    query_scale: float = 1.0
    local_rope: Rope | None = None
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def kv_planes(self) -> int:
        """2 where K and V are cached apart, 1 where values are read out of the keys."""
        return 1 if self.latent else 2

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that carry position."""
        return self.latent.rope_dim if self.latent else self.head_dim

    def rope_of(self, layer: int) -> Rope:
        return self.local_rope if self.local_rope and self.windows[layer] else self.rope


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads `config.json`.

    Raises:
        InvalidArgument: a family, activation or RoPE type that is not supported, or a missing or inconsistent field.
    """
    family = config.get("model_type", "")
    if family not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise InvalidArgument(f"the model architecture {family!r} is not supported; supported are {supported}")
    if config.get("quantization_config"):
        raise InvalidArgument("weights that are stored quantised (quantization_config) are not supported")
    try:
        parsed = _check(_parse(family, config))
        return _gemma3(parsed, config) if family == "gemma3_text" else _latent(parsed, config)
    except KeyError as error:
        raise InvalidArgument(f"config.json lacks the field {error.args[0]!r}") from None


def _parse(family: str, config: Mapping[str, Any]) -> DecoderConfig:
    heads = config["num_attention_heads"]
    biased = bool(config.get("attention_bias", False))
    biased_inputs = family in ("qwen2", "qwen2_moe")
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
        rope=read_ropes(config)[0] if family == "gemma3_text" else read_rope(config),
        windows=read_windows(config),
        tied=bool(config.get("tie_word_embeddings", family == "gemma3_text")),
        qkv_bias=bool(config.get("qkv_bias", True)) if biased_inputs else biased,
        output_bias=biased and not biased_inputs,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=_QK_NORMS.get(family),
        activation=_activation(config),
        experts=read_experts(config),
    )


def _check(config: DecoderConfig) -> DecoderConfig:
    if config.heads % config.kv_heads:
        raise InvalidArgument(f"{config.heads} query heads cannot share {config.kv_heads} KV heads evenly")
    if config.head_dim % 2:
        raise InvalidArgument(f"the head dimension {config.head_dim} is odd, which RoPE cannot rotate")
    return config


def _gemma3(parsed: DecoderConfig, config: Mapping[str, Any]) -> DecoderConfig:
    """What Gemma 3 (arXiv 2503.19786) adds to the common shape."""
    _refuse(config, "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
    return replace(
        parsed,
        sandwich=True,
        norm_offset=1.0,
        embedding_scale=parsed.hidden_size**0.5,
        query_scale=(parsed.head_dim / config.get("query_pre_attn_scalar", 256)) ** 0.5,
        local_rope=read_ropes(config)[1],
    )


def _latent(parsed: DecoderConfig, config: Mapping[str, Any]) -> DecoderConfig:
    """Attention in the latent space is that of many query heads to one KV head, with a scale of its own."""
    _refuse(config, "clip_qkv")
    if (latent := read_latent(config)) is None:
        return parsed
    _refuse(config, "attention_bias", "mlp_bias")
    scale = latent.scale * latent.entry_dim**0.5
    return replace(parsed, kv_heads=1, head_dim=latent.entry_dim, query_scale=scale, latent=latent)


def _refuse(config: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if config.get(name):
            raise InvalidArgument(f"{name}={config[name]!r} is not supported for {config['model_type']}")


def _activation(config: Mapping[str, Any]) -> Literal["silu", "gelu_tanh"]:
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise InvalidArgument(f"the activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
