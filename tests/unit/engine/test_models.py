"""Logits of the decoder over paged KV against transformers, on tiny random models of every family."""

import json
import random
from pathlib import Path

import pytest
import torch

from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.attention.reference import ReferenceAttention
from kvmesh.engine.loading import load
from kvmesh.engine.models.config import parse
from kvmesh.engine.models.llama import Decoder
from kvmesh.engine.runner import kv_layout
from kvmesh.errors import InvalidArgument
from kvmesh.types import BLOCK_TOKENS
from tests.unit.engine.native_kernel import native_attention
from tests.unit.engine.tiny import LINEAR, LLAMA3, VOCABULARY, YARN, tiny_model

MODELS = {
    "llama-gqa": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 6}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "yarn-rope": ("llama", {"rope_parameters": YARN}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "mistral-window": ("mistral", {"sliding_window": 20, "head_dim": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}
PROMPT, STEPS = 61, 8
TOLERANCE = 1e-4


@pytest.fixture(params=MODELS, scope="module")
def model_pair(request, tmp_path_factory):
    family, overrides = MODELS[request.param]
    oracle, folder = tiny_model(family, tmp_path_factory.mktemp(request.param), **overrides)
    return oracle, load(folder, "float32")


class Sequence:
    """Feeds one sequence to a decoder through a pool whose blocks are in random order."""

    def __init__(self, model: Decoder, attention=CpuAttention, blocks: int = 24, seed: int = 0) -> None:
        self.model, self.pool = model, KvPool(kv_layout(model), blocks)
        self.pool.data.fill_(float("nan"))
        self.attention = attention(self.pool, model.windows)
        self.block_ids = random.Random(seed).sample(range(blocks), PROMPT // BLOCK_TOKENS + 2)
        self.length = 0

    @torch.inference_mode()
    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        end = self.length + len(tokens)
        self.attention.plan([Segment(self.length, len(tokens), self.block_ids[: -(-end // BLOCK_TOKENS)])])
        hidden = self.model.embed(tokens)
        hidden = self.model.forward(hidden, torch.arange(self.length, end), self.attention)
        self.length = end
        return self.model.logits(hidden)


def expected_logits(oracle, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(tokens.unsqueeze(0)).logits[0]


def random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", [native_attention, CpuAttention, ReferenceAttention])
@pytest.mark.parametrize("chunks", [(PROMPT,), (16, 32, 13), (1, 7, 50, 3)], ids=["whole", "aligned", "ragged"])
def test_prefill_in_chunks_and_decode_match_transformers(model_pair, chunks, attention):
    oracle, model = model_pair
    tokens = random_tokens(PROMPT + STEPS)
    sequence = Sequence(model, attention)
    parts = tokens.split([*chunks, *[1] * STEPS])
    logits = torch.cat([sequence.feed(part) for part in parts])
    torch.testing.assert_close(logits, expected_logits(oracle, tokens), atol=TOLERANCE, rtol=0)


def test_the_models_are_not_trivial(model_pair):
    """Logits must depend on far context, or the comparisons above would prove little."""
    oracle, _ = model_pair
    tokens = random_tokens(PROMPT)
    changed = tokens.clone()
    changed[PROMPT - 10] = (changed[PROMPT - 10] + 1) % VOCABULARY
    assert (expected_logits(oracle, tokens)[-1] - expected_logits(oracle, changed)[-1]).abs().max() > 0.01


def test_layer_ranges_compose(tmp_path: Path):
    oracle, folder = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    first, second = load(folder, "float32", layers=(0, 1)), load(folder, "float32", layers=(1, 3))
    tokens = random_tokens(30)
    with torch.inference_mode():
        hidden = first.embed(tokens)
        for stage in (first, second):
            attention = CpuAttention(KvPool(kv_layout(stage), 2), stage.windows)
            attention.plan([Segment(0, 30, [1, 0])])
            hidden = stage.forward(hidden, torch.arange(30), attention)
        logits = second.logits(hidden)
    torch.testing.assert_close(logits, expected_logits(oracle, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype, tmp_path: Path):
    oracle, folder = tiny_model("llama", tmp_path)
    tokens = random_tokens(40)
    logits, expected = Sequence(load(folder, dtype)).feed(tokens), expected_logits(oracle, tokens)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() / expected.abs().mean() < (0.1 if dtype == "bfloat16" else 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"num_key_value_heads": 4}, "6 query heads cannot share 4 KV heads"),
        ({"vocab_size": None}, "lacks the field 'vocab_size'"),
    ],
)
def test_unsupported_configurations_are_refused(change, message):
    config = {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 8, "vocab_size": 9,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    changed = {name: value for name, value in {**config, **change}.items() if value is not None}
    with pytest.raises(InvalidArgument, match=message):
        parse(changed)


def test_old_and_new_rope_fields_mean_the_same():
    base = json.loads('{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 8}')
    base |= {"vocab_size": 9, "num_attention_heads": 6, "max_position_embeddings": 64}
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    old = parse({**base, "rope_theta": LLAMA3["rope_theta"], "rope_scaling": scaling})
    assert old == parse({**base, "rope_parameters": LLAMA3})
    assert old.rope.theta == LLAMA3["rope_theta"]
