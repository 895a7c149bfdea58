"""Holds a decoder over paged KV against transformers: the same tokens, whole and in chunks, prefilled and decoded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.models.llama import Decoder
from kvmesh.engine.runner import kv_layout
from kvmesh.hub import ModelFolder
from kvmesh.types import BLOCK_TOKENS

VOCABULARY = 96
PROMPT, STEPS = 61, 16
TOLERANCE = 1e-4
CHUNKS = {"whole": (PROMPT,), "aligned": (16, 32, 13), "ragged": (1, 7, 50, 3)}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def saved_model(
    config_class: Any, model_class: Any, path: Path, norm_mean: float = 1.0, scale: float = 0.3, **overrides: Any
) -> tuple[PreTrainedModel, ModelFolder]:
    """A random model, with weights wide enough that attention and routing are far from uniform, as a folder."""
    torch.manual_seed(7)
    config = config_class(**{**SMALL, **overrides}, attn_implementation="eager")
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            width = scale if tensor.ndim > 1 else 0.2
            tensor.copy_(torch.randn_like(tensor) * width + (norm_mean if "norm" in name else 0.0))
    model.save_pretrained(path)
    return model, ModelFolder(config.model_type, path)


def random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def expected_logits(oracle: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = oracle(tokens.unsqueeze(0)).logits[0]
    return logits


@torch.inference_mode()
def paged_logits(
    model: Decoder, tokens: torch.Tensor, chunks: Sequence[int], attention: Any = CpuAttention
) -> torch.Tensor:
    """Logits of all tokens: `chunks` at a time, then one by one, through blocks in random order."""
    blocks = 24
    pool = KvPool(kv_layout(model), blocks)
    pool.data.fill_(float("nan"))
    back_end = attention(pool, model.windows)
    block_ids = random.Random(0).sample(range(blocks), -(-len(tokens) // BLOCK_TOKENS))
    parts, start = [], 0
    for part in tokens.split([*chunks, *[1] * (len(tokens) - sum(chunks))]):
        end = start + len(part)
        back_end.plan([Segment(start, len(part), block_ids[: -(-end // BLOCK_TOKENS)])])
        hidden = model.forward(model.embed(part), torch.arange(start, end), back_end)
        parts.append(model.logits(hidden))
        start = end
    return torch.cat(parts)


def assert_matches(
    oracle: PreTrainedModel, model: Decoder, chunks: Sequence[int], attention: Any = CpuAttention
) -> None:
    """Prefill in `chunks` and STEPS decode steps give the logits of transformers."""
    tokens = random_tokens(PROMPT + STEPS)
    found, expected = paged_logits(model, tokens, chunks, attention), expected_logits(oracle, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
