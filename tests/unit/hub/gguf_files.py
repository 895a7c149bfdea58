"""Writes GGUF files as llama.cpp's converter does, for tests of the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
Array = np.ndarray[Any, Any]
Encode = Callable[[str, Array], tuple[Array, gguf.GGMLQuantizationType]]


def plain(name: str, values: Array) -> tuple[Array, gguf.GGMLQuantizationType]:
    return values, gguf.GGMLQuantizationType.F32


def gguf_name(name: str, architecture: str = "llama") -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        names = NAMES | GEMMA3_NAMES if architecture == "gemma3" else NAMES
        return f"blk.{layer}.{names[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def permute(weights: Array, heads: int) -> Array:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path,
    architecture: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    encode: Encode = plain,
    metadata: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """A file of `tensors` under transformers' names; `metadata` adds or replaces the vocabulary."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    (metadata or byte_vocabulary)(writer)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, values in tensors.items():
        target = gguf_name(name, architecture)
        part = target.split(".")[-2]
        ordered = permute(values, heads[part]) if architecture == "llama" and part in heads else values
        if architecture == "gemma3" and "norm" in target:
            ordered = ordered + 1
        raw, kind = encode(target, np.ascontiguousarray(ordered))
        writer.add_tensor(target, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_vocabulary(writer: gguf.GGUFWriter) -> None:
    """The least byte-level vocabulary: two control tokens, some letters, one merge."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", *"abcdefgh", "ab"])
    writer.add_token_types([3, 3, *[1] * 9])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
