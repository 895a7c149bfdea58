"""Gemma 3 text models against transformers: two ropes, windows, sandwich norms, scaled embeddings and queries."""

from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.attention.reference import ReferenceAttention
from kvmesh.engine.loading import load
from kvmesh.engine.models.config import parse
from kvmesh.engine.runner import kv_layout
from kvmesh.errors import InvalidArgument
from tests.unit.engine.handover import assert_handed_over
from tests.unit.engine.oracle import (
    CHUNKS,
    PROMPT,
    SMALL,
    assert_matches,
    expected_logits,
    paged_logits,
    random_tokens,
    saved_model,
)

BASE: dict[str, Any] = {"head_dim": 16, "sliding_window": 20, "sliding_window_pattern": 3, "query_pre_attn_scalar": 40}
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1, "num_attention_heads": 4},
    "ropes": {"rope_parameters": ROPES},
    "untied": {"tie_word_embeddings": False, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}


@pytest.fixture(params=MODELS, scope="module")
def pair(request, tmp_path_factory):
    overrides = {**BASE, **MODELS[request.param]}
    path = tmp_path_factory.mktemp(request.param)
    oracle, folder = saved_model(Gemma3TextConfig, Gemma3ForCausalLM, path, norm_mean=0.0, scale=0.2, **overrides)
    return oracle, load(folder, "float32")


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_prefill_in_chunks_and_decode_match_transformers(pair, chunks):
    assert_matches(*pair, chunks)


def test_the_reference_attention_agrees(pair):
    assert_matches(*pair, CHUNKS["ragged"], ReferenceAttention)


def test_far_context_matters(pair):
    """Or windows and global layers would prove little."""
    tokens = random_tokens(PROMPT)
    changed = tokens.clone()
    changed[5] = (changed[5] + 1) % 96
    assert (expected_logits(pair[0], tokens)[-1] - expected_logits(pair[0], changed)[-1]).abs().max() > 0.01


def test_kv_travels_and_the_tokens_are_equal(tmp_path):
    overrides = {**BASE, "rope_parameters": ROPES}
    _, folder = saved_model(Gemma3TextConfig, Gemma3ForCausalLM, tmp_path, norm_mean=0.0, scale=0.2, **overrides)
    assert_handed_over(folder, "float32")


def test_bfloat16_is_close(tmp_path):
    oracle, folder = saved_model(Gemma3TextConfig, Gemma3ForCausalLM, tmp_path, norm_mean=0.0, scale=0.2, **BASE)
    tokens = random_tokens(40)
    logits, expected = paged_logits(load(folder, "bfloat16"), tokens, (40,)), expected_logits(oracle, tokens)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() / expected.abs().mean() < 0.1


def test_a_stage_knows_the_ropes_of_its_own_layers(tmp_path):
    """The second of two stages begins with a global layer, whose rope and window are not those of layer 0."""
    oracle, folder = saved_model(
        Gemma3TextConfig, Gemma3ForCausalLM, tmp_path, norm_mean=0.0, scale=0.2, **BASE, rope_parameters=ROPES
    )
    whole, (first, second) = load(folder, "float32"), [load(folder, "float32", layers=x) for x in ((0, 2), (2, 3))]
    assert first.windows + second.windows == whole.windows == (20, 20, None)
    tokens = random_tokens(PROMPT)
    with torch.inference_mode():
        hidden = first.embed(tokens)
        for stage in (first, second):
            pool = KvPool(kv_layout(stage), 4)
            attention = CpuAttention(pool, stage.windows)
            attention.plan([Segment(0, PROMPT, [3, 1, 0, 2])])
            hidden = stage.forward(hidden, torch.arange(PROMPT), attention)
        logits = second.logits(hidden)
    torch.testing.assert_close(logits, expected_logits(oracle, tokens), atol=1e-4, rtol=0)


def test_old_and_new_fields_mean_the_same():
    config = {**SMALL, **BASE, "model_type": "gemma3_text", "rope_theta": 5000.0, "rope_local_base_freq": 100.0}
    old = parse({**config, "rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    assert old == parse({**SMALL, **BASE, "model_type": "gemma3_text", "rope_parameters": ROPES, "layer_types": types})
    assert [old.rope_of(layer).theta for layer in range(3)] == [100.0, 100.0, 5000.0]


@pytest.mark.parametrize(
    "change",
    [{"attn_logit_softcapping": 50.0}, {"final_logit_softcapping": 30.0}, {"use_bidirectional_attention": True}],
)
def test_what_is_not_gemma_3_is_refused(change):
    with pytest.raises(InvalidArgument, match=next(iter(change))):
        parse({**SMALL, **BASE, "model_type": "gemma3_text", **change})
