"""The whole engine on torch: batching, chunking, prefix reuse and preemption change no greedy token (float32)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.api import EngineRequest, Failed, TokenOutput
from kvmesh.engine.build import build_engine, build_runner
from kvmesh.engine.core import EngineCore
from kvmesh.engine.runner import TorchRunner
from kvmesh.types import SamplingParams
from tests.unit.engine.tiny import VOCABULARY, tiny_model

NEW_TOKENS = 10
COMMON = [7, 3, 9, 1] * 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def runner(tiny) -> TorchRunner:
    return build_runner(tiny[1], "float32", blocks=14, device="cpu")


def generate(engine: EngineCore, prompts: list[tuple[int, ...]], count: int = NEW_TOKENS) -> dict[str, list[int]]:
    sampling = SamplingParams(max_tokens=count, temperature=0.0)
    for i, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(i), prompt, sampling))
    outputs: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for _ in range(3000):
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, TokenOutput):
                assert event.offset == len(outputs[event.request_id])
                outputs[event.request_id].append(event.token_id)
        if not engine.has_work():
            break
    assert engine.check_integrity() == []
    assert engine.statistics().blocks_used == 0
    return outputs


def follows(oracle, prompt: tuple[int, ...], output: list[int]) -> bool:
    """True if each output token is the oracle's argmax after all before it."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([[*prompt, *output[:-1]]])).logits[0]
    return output == logits[len(prompt) - 1 :].argmax(-1).tolist()


prompts = st.lists(
    st.tuples(st.integers(0, 40), st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=25, deadline=None)
@given(prompts, st.sampled_from([8, 17, 64, 512]), st.sampled_from([1, 3, 16]))
def test_no_policy_changes_a_greedy_token(tiny, runner, parts, token_budget, max_running):
    """14 blocks are too few for all at once, so that long batches preempt; common prefixes are reused."""
    engine = EngineCore(runner, max_running=max_running, token_budget=max(token_budget, max_running))
    requests = [(*COMMON[:shared], *rest) for shared, rest in parts]
    for outputs in (generate(engine, requests), generate(engine, requests)):
        for i, prompt in enumerate(requests):
            assert len(outputs[str(i)]) == NEW_TOKENS
            assert follows(tiny[0], prompt, outputs[str(i)])


def test_preemption_and_reuse_do_happen_here(tiny, runner):
    engine = EngineCore(runner, max_running=16, token_budget=512)
    requests = [(*COMMON, token) for token in range(7)]
    generate(engine, requests)
    generate(engine, requests)
    assert engine.statistics().hits_total > 0
    growing = [tuple(range(start, start + 15)) for start in range(7)]
    outputs = generate(engine, growing, count=50)
    assert engine.statistics().preemptions_total > 0
    assert all(follows(tiny[0], prompt, outputs[str(i)]) for i, prompt in enumerate(growing))


def test_build_engine_yields_a_working_engine(tiny):
    engine = build_engine(tiny[1], dtype="float32", blocks=8, token_budget=64, max_running=4, threads=1, device="cpu")
    prompt = (5, 6, 7)
    assert follows(tiny[0], prompt, generate(engine, [prompt])["0"])
