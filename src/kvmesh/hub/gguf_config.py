"""From GGUF metadata to `config.json`, under transformers' keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmesh.errors import InvalidArgument
from kvmesh.hub.gguf_file import GgufFile

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_LAYERS_OF_GEMMA3_27B = 62


def config_of(file: GgufFile) -> dict[str, Any]:
    """The configuration of a Llama, Qwen2, Qwen3 or Gemma 3 file.

    Raises:
        InvalidArgument: another architecture, or a RoPE that transformers' keys cannot say.
    """
    if file.architecture not in _CLASSES:
        found, supported = file.architecture, ", ".join(_CLASSES)
        raise InvalidArgument(f"the GGUF architecture {found!r} is not supported; supported are {supported}")
    heads = file.hyperparameter("attention.head_count")
    hidden = file.hyperparameter("embedding_length")
    head_dim = file.hyperparameter("attention.key_length", hidden // heads)
    config = {
        "architectures": [_CLASSES[file.architecture]],
        "model_type": file.architecture,
        "num_hidden_layers": file.hyperparameter("block_count"),
        "hidden_size": hidden,
        "intermediate_size": file.hyperparameter("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.hyperparameter("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": file.hyperparameter("context_length"),
        "rms_norm_eps": round(file.hyperparameter("attention.layer_norm_rms_epsilon"), 12),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": file.architecture != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        "rope_theta": file.hyperparameter("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, head_dim),
        "torch_dtype": "float32",
    }
    return config | (_gemma3(file, config) if file.architecture == "gemma3" else {}) | special_ids(file)


def _gemma3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """What differs for Gemma 3. Which layers are global, and the scale of the largest one, llama.cpp does not store."""
    largest = config["num_hidden_layers"] == _LAYERS_OF_GEMMA3_27B
    return {
        "model_type": "gemma3_text",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": file.hyperparameter("attention.sliding_window"),
        "sliding_window_pattern": file.hyperparameter("attention.sliding_window_pattern", 6),
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if largest
        else config["head_dim"],
        "rope_theta": file.hyperparameter("rope.freq_base", 1e6),
        "rope_local_base_freq": file.hyperparameter("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": file.get("gemma3.final_logit_softcapping"),
    }


def special_ids(file: GgufFile) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad text; `eos_token_id` is a list if more than one ends an answer."""
    eos = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = list(dict.fromkeys(int(token) for token in eos if token is not None))
    return {
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }


def _rope_scaling(file: GgufFile, head_dim: int) -> dict[str, Any] | None:
    if file.hyperparameter("rope.dimension_count", head_dim) != head_dim:
        raise InvalidArgument("rotating only a part of each head (rope.dimension_count) is not supported")
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, head_dim)
    kind = file.hyperparameter("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise InvalidArgument(f"the RoPE scaling {kind!r} is not supported; supported are linear and llama3")
    return {"rope_type": "linear", "factor": file.hyperparameter("rope.scaling.factor")}


def _llama3_scaling(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """Llama 3.1 files store a divisor per frequency; all known ones follow one formula, which is checked."""
    divisors = file.tensors["rope_freqs.weight"].load()
    theta, factor = file.hyperparameter("rope.freq_base", 10000.0), float(divisors.max())
    turns = 8192 * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    blend = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    if not np.allclose(1 / divisors, (1 - blend) / factor + blend, rtol=1e-3):
        raise InvalidArgument("the RoPE frequency factors of this GGUF file are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
