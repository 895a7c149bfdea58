"""DeepSeek-V2 and V3: logits against transformers, and the latent cache on its way from one engine to another."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from kvmesh.engine.api import EngineRequest
from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.latent import LatentAttention, LatentHeads
from kvmesh.engine.attention.native import supports
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.attention.reference import ReferenceAttention
from kvmesh.engine.build import build_runner, kv_layout_of
from kvmesh.engine.core import EngineCore
from kvmesh.engine.loading import load
from kvmesh.engine.models.config import parse
from kvmesh.engine.runner import kv_layout
from kvmesh.errors import InvalidArgument
from kvmesh.kv import bitstream
from kvmesh.types import SamplingParams
from tests.unit.engine.handover import assert_handed_over
from tests.unit.engine.oracle import (
    CHUNKS,
    SMALL,
    assert_matches,
    expected_logits,
    paged_logits,
    random_tokens,
    saved_model,
)

LATENT: dict[str, Any] = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 1.1,
}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0}
V2, V3 = (DeepseekV2Config, DeepseekV2ForCausalLM), (DeepseekV3Config, DeepseekV3ForCausalLM)
MODELS: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "v2-lite": (V2, {"rope_parameters": YARN}),
    "v2-query-rank": (V2, {"q_lora_rank": 20, "routed_scaling_factor": 1.5}),
    "v2-groups": (V2, {**LIMITED, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}}),
    "v2-dense": (V2, {"first_k_dense_replace": 3, "tie_word_embeddings": True}),
    "v3": (V3, {"q_lora_rank": 20, "n_group": 4, "topk_group": 2, "rope_parameters": YARN}),
    "v3-halves": (V3, {"rope_interleave": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "v3-plain-query": (V3, {"n_group": 2, "topk_group": 1, "n_shared_experts": 2, "first_k_dense_replace": 0}),
}


@torch.inference_mode()
def run(model: Any, attention: Any, tokens: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    """Logits of the segments' tokens, one after the other."""
    attention.plan(segments)
    positions = torch.cat([torch.arange(segment.start, segment.end) for segment in segments])
    return model.logits(model.forward(model.embed(tokens[positions]), positions, attention))


def saved(name: str, path: Any) -> tuple[Any, Any]:
    (config_class, model_class), overrides = MODELS[name]
    return saved_model(config_class, model_class, path, scale=0.25, **{**LATENT, **overrides})


@pytest.fixture(params=MODELS, scope="module")
def pair(request, tmp_path_factory):
    oracle, folder = saved(request.param, tmp_path_factory.mktemp(request.param))
    return oracle, load(folder, "float32")


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_prefill_in_chunks_and_decode_match_transformers(pair, chunks):
    assert_matches(*pair, chunks)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_expanding_long_chunks_matches_transformers(pair, chunks):
    assert_matches(*pair, chunks, LatentAttention)


def test_a_batch_may_expand_some_sequences_only(pair):
    """A prompt, a chunk after a past, and a step, in one batch: as each alone, on latents."""
    _, model = pair
    tokens, starts, ends = random_tokens(100), (0, 20, 45), (30, 55, 46)
    segments = [Segment(s, e - s, range(4 * i, 4 * i + 4)) for i, (s, e) in enumerate(zip(starts, ends, strict=True))]

    def logits(attention: type[CpuAttention], together: bool) -> torch.Tensor:
        back_end = attention(KvPool(kv_layout(model), 12), model.windows)
        past = [Segment(0, s.start, s.block_ids) for s in segments[1:]]
        batches = [past, segments] if together else [[segment] for segment in (*past, *segments)]
        return torch.cat([run(model, back_end, tokens, batch) for batch in batches])

    torch.testing.assert_close(logits(LatentAttention, True), logits(CpuAttention, False), atol=1e-4, rtol=0)


def test_the_reference_attention_agrees(pair):
    assert_matches(*pair, CHUNKS["ragged"], ReferenceAttention)


def test_long_chunks_expand_and_steps_never_do():
    heads = LatentHeads(torch.zeros(16, 128, 512), torch.zeros(16, 512, 128), 1.0, 1.0)
    assert [heads.pays(tokens, 4096, 64) for tokens in (1, 100, 150, 200, 4096)] == [False, False, False, True, True]
    assert not any(heads.pays(1, length, 64) for length in (2, 16, 1000, 100_000))


def test_the_cache_holds_one_latent_per_token(tmp_path):
    _, folder = saved("v3", tmp_path)
    layout = kv_layout_of(folder, "bfloat16")
    assert layout.chunk_shape(256) == (3, 1, 256, 1, 24 + 8)
    assert layout.bytes_per_token == 3 * 32 * 2
    assert not supports(layout)
    fields = folder.layout("bfloat16")
    assert (fields["kv_heads"], fields["head_dim"]) == ("1", "32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["v2-lite", "v3"])
def test_a_latent_cache_travels_and_the_tokens_are_equal(name, dtype, tmp_path):
    assert_handed_over(saved(name, tmp_path)[1], dtype)


def test_a_bitstream_says_how_many_planes_it_has():
    data = np.zeros((2, 1, 5, 1, 8), np.float32)
    header = bitstream.decode(bitstream.encode(data, "float32", 0)).header
    assert (header.planes, header.shape) == (1, data.shape)
    assert bitstream.decode(bitstream.encode(np.zeros((2, 2, 5, 1, 8), np.float32), "float32", 0)).header.planes == 2
    with pytest.raises(ValueError, match="not KV"):
        bitstream.encode(np.zeros((2, 3, 5, 1, 8), np.float32), "float32", 0)


def test_an_engine_refuses_kv_of_the_other_kind(tmp_path):
    _, folder = saved("v2-dense", tmp_path)
    engine = EngineCore(build_runner(folder, "float32", blocks=8, device="cpu"))
    engine.add(EngineRequest("d", (1, 2, 3), SamplingParams(max_tokens=1), load_kv=True))
    engine.step()
    with pytest.raises(InvalidArgument, match=r"is not float32\[3, 1, 3, 1, 32\]"):
        engine.import_kv("d", 0, np.zeros((3, 2, 3, 1, 32), np.float32))


def test_half_precision_is_close(tmp_path):
    oracle, folder = saved("v2-dense", tmp_path)
    tokens = random_tokens(40)
    logits, expected = paged_logits(load(folder, "bfloat16"), tokens, (40,)), expected_logits(oracle, tokens)
    assert (logits - expected).abs().mean() / expected.abs().mean() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": None}, "lacks the field 'kv_lora_rank'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "stored quantised"),
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
        ({"norm_topk_prob": True}, "norm_topk_prob is not supported"),
        ({**LIMITED, "n_group": 3}, "8 experts cannot be 2 of 3 groups"),
    ],
)
def test_unsupported_configurations_are_refused(change, message):
    config = {**SMALL, **LATENT, "model_type": "deepseek_v2", **change}
    with pytest.raises(InvalidArgument, match=message):
        parse({name: value for name, value in config.items() if value is not None})
