"""From GGUF tensors to `model.safetensors`: names, the order of rotary rows, and a writer that streams.

Gemma's norms are stored less 1 by transformers and whole by llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from kvmesh.errors import InvalidArgument
from kvmesh.hub.gguf_file import Array, GgufFile, GgufTensor
from kvmesh.hub.progress import Progress

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3 = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_IGNORED = {"rope_freqs.weight"}
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def write_weights(file: GgufFile, path: Path, progress: Progress) -> None:
    """Writes every tensor, one at a time, so that memory holds one.

    Raises:
        InvalidArgument: a tensor that the architecture does not have.
    """
    inner = _INNER | (_GEMMA3 if file.architecture == "gemma3" else {})
    kept = {name: tensor for name, tensor in file.tensors.items() if name not in _IGNORED}
    tensors = {transformers_name(name, inner): tensor for name, tensor in kept.items()}
    with path.open("wb") as stream:
        stream.write(_header(tensors))
        for done, values in enumerate(_values(file, tensors.values())):
            stream.write(np.ascontiguousarray(values).tobytes())
            progress("Dequantising tensors", done + 1, len(tensors))


def transformers_name(name: str, inner: Mapping[str, str] = _INNER) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        layer, part = match.groups()
        if part in inner:
            return f"model.layers.{layer}.{inner[part]}.{kind}"
    elif stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    raise InvalidArgument(f"the GGUF tensor {name} has no place in the supported architectures")


def unpermute(values: Array, heads: int) -> Array:
    """Undoes llama.cpp's reordering of Q and K rows, which makes rotary pairs neighbours instead of halves apart."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _values(file: GgufFile, tensors: Iterable[GgufTensor]) -> Iterator[Array]:
    heads = _permuted_heads(file)
    for tensor in tensors:
        part, values = tensor.name.split(".")[-2], tensor.load()
        if file.architecture == "gemma3" and part.endswith("_norm"):
            yield values - 1
        else:
            yield unpermute(values, heads[part]) if part in heads else values


def _permuted_heads(file: GgufFile) -> dict[str, int]:
    """Projections whose rows are reordered, with their heads: those of the architecture `llama` alone."""
    if file.architecture != "llama":
        return {}
    heads = int(file.hyperparameter("attention.head_count"))
    return {"attn_q": heads, "attn_k": int(file.hyperparameter("attention.head_count_kv", heads))}


def _header(tensors: dict[str, GgufTensor]) -> bytes:
    """The safetensors header: its length, then JSON of type, shape and byte range of each tensor."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + int(np.prod(tensor.shape)) * _ITEM_BYTES[tensor.dtype]
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
