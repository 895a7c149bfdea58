"""Mixtures of experts: logits against transformers for every family, and the parts against plain definitions."""

from typing import Any

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kvmesh.engine.attention.reference import ReferenceAttention
from kvmesh.engine.loading import load
from kvmesh.engine.models.config import parse
from kvmesh.engine.models.expert_config import Routing
from kvmesh.engine.models.moe import MixtureOfExperts, Router
from kvmesh.errors import InvalidArgument
from tests.unit.engine.handover import assert_handed_over
from tests.unit.engine.oracle import CHUNKS, PROMPT, SMALL, assert_matches, expected_logits, random_tokens, saved_model

QWEN: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SHARED: dict[str, Any] = {**QWEN, "shared_expert_intermediate_size": 40}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 20}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 8}),
    "mixtral-window": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "sliding_window": 20}),
    "qwen2": (Qwen2MoeConfig, Qwen2MoeForCausalLM, SHARED),
    "qwen2-dense-layers": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**SHARED, "mlp_only_layers": [1]}),
    "qwen2-windows": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**SHARED, **WINDOW, "max_window_layers": 1}),
    "qwen2-renormalised": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**SHARED, "norm_topk_prob": True}),
    "qwen3": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**QWEN, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-window": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**QWEN, "head_dim": 8, **WINDOW}),
    "qwen3-step": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**QWEN, "head_dim": 8, "decoder_sparse_step": 2}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 16, "num_experts_per_tok": 8}),
    "olmoe-mha": (OlmoeConfig, OlmoeForCausalLM, {**QWEN, "num_key_value_heads": 6, "norm_topk_prob": True}),
}


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request, tmp_path_factory):
    config_class, model_class, overrides = FAMILIES[request.param]
    oracle, folder = saved_model(config_class, model_class, tmp_path_factory.mktemp(request.param), **overrides)
    return oracle, load(folder, "float32")


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_prefill_in_chunks_and_decode_match_transformers(pair, chunks):
    assert_matches(*pair, chunks)


def test_the_reference_attention_agrees(pair):
    assert_matches(*pair, CHUNKS["ragged"], ReferenceAttention)


def test_the_choice_of_experts_matters(pair):
    """Exchanging two experts of the first sparse layer changes the logits, or the tests above would prove little."""
    oracle, model = pair
    mixture = next(x.feed_forward for x in model.weights.layers if isinstance(x.feed_forward, MixtureOfExperts))
    with torch.inference_mode():
        counts = mixture.router(torch.randn(64, 48))[0].flatten().bincount(minlength=len(mixture.experts))
    assert (counts > 0).sum() > 2
    tokens = random_tokens(PROMPT)
    mixture.experts[0], mixture.experts[1] = mixture.experts[1], mixture.experts[0]
    try:
        with pytest.raises(AssertionError):
            assert_matches(oracle, model, (PROMPT,))
    finally:
        mixture.experts[0], mixture.experts[1] = mixture.experts[1], mixture.experts[0]
    assert expected_logits(oracle, tokens).isfinite().all()


@pytest.mark.parametrize("name", ["mixtral-window", "qwen2", "qwen3", "olmoe"])
def test_kv_travels_and_the_tokens_are_equal(name, tmp_path):
    config_class, model_class, overrides = FAMILIES[name]
    assert_handed_over(saved_model(config_class, model_class, tmp_path, **overrides)[1], "float32")


def _naive(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    experts, weights = mixture.router(x)
    rows = []
    for row, chosen, by in zip(x, experts.tolist(), weights, strict=True):
        rows.append(sum(w * mixture.experts[e](row.unsqueeze(0))[0] for e, w in zip(chosen, by, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("active", [1, 3, 6])
def test_grouping_by_expert_is_the_plain_sum(tokens, active):
    torch.manual_seed(tokens)
    matrices = [torch.randn(8, 8) for _ in range(6)]
    mixture = MixtureOfExperts(
        Router(torch.randn(6, 8), Routing(active)), [lambda x, m=m: torch.tanh(x @ m) for m in matrices]
    )
    x = torch.randn(tokens, 8)
    torch.testing.assert_close(mixture(x), _naive(mixture, x), atol=1e-5, rtol=0)


def test_a_token_gets_the_same_result_in_any_batch():
    torch.manual_seed(0)
    exact = torch.randn(8, 4).mul(64).round().div(64)
    mixture = MixtureOfExperts(Router(exact, Routing(3)), [lambda x, s=s: x * s for s in range(8)])
    x = torch.randn(20, 4).mul(64).round().div(64)
    alone = torch.cat([mixture(row) for row in x.split(1)])
    assert torch.equal(mixture(x), alone)
    assert torch.equal(mixture(x.flip(0)).flip(0), alone)


def test_groups_limit_the_choice():
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.1, 0.2]]).logit()
    best = Router(scores.T, Routing(2, "sigmoid", groups=3, active_groups=1))
    pair = Router(scores.T, Routing(2, "sigmoid", groups=3, active_groups=1, biased=True), torch.zeros(6))
    one = torch.ones(1, 1)
    assert sorted(best(one)[0][0].tolist()) == [0, 1]
    assert sorted(pair(one)[0][0].tolist()) == [2, 3]


def test_a_bias_chooses_but_does_not_weigh():
    scores = torch.tensor([[0.9, 0.2, 0.3]]).logit()
    router = Router(scores.T, Routing(1, "sigmoid", scale=2.0, biased=True), torch.tensor([-1.0, 1.0, 0.0]))
    experts, weights = router(torch.ones(1, 1))
    assert experts.tolist() == [[1]]
    torch.testing.assert_close(weights, torch.tensor([[0.4]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, "cannot choose 9 experts"),
        ({"num_local_experts": None}, "lacks the field 'num_local_experts'"),
        ({"model_type": "olmoe", "num_experts": 8, "clip_qkv": 3.0}, "clip_qkv=3.0 is not supported"),
    ],
)
def test_unsupported_mixtures_are_refused(change, message):
    config = {**SMALL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, **change}
    with pytest.raises(InvalidArgument, match=message):
        parse({name: value for name, value in config.items() if value is not None})
