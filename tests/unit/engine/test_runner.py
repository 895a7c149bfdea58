"""One iteration on torch: batching changes nothing, KV moves between runners, copies precede computing."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.api import KvLayout
from kvmesh.engine.batch import Batch, Draw, Row
from kvmesh.engine.build import blocks_within, build_runner, free_memory, kv_layout_of, resolve_dtype
from kvmesh.engine.linear import resolve_precision
from kvmesh.engine.runner import TorchRunner
from kvmesh.errors import InvalidArgument
from kvmesh.types import BLOCK_TOKENS, SamplingParams
from tests.unit.engine.tiny import VOCABULARY, tiny_model

BLOCKS = 64
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, logprobs=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model("mistral", tmp_path_factory.mktemp("mistral"), sliding_window=20, head_dim=8)


@pytest.fixture(scope="module")
def runner(tiny) -> TorchRunner:
    return build_runner(tiny[1], "float32", blocks=BLOCKS, device="cpu")


def greedy_draw(output=()) -> tuple[Draw, ...]:
    return (Draw(GREEDY, 0, len(output), (), tuple(output)),)


def blocks_for(tokens: int, free: list[int]) -> list[int]:
    return [free.pop() for _ in range(-(-tokens // BLOCK_TOKENS))]


def random_prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def oracle_tokens(oracle, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(oracle(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_the_runner_describes_itself(runner):
    assert runner.layout == KvLayout(layers=3, kv_heads=2, head_dim=8, dtype="float32")
    assert (runner.blocks, runner.max_model_len, runner.vocabulary_size) == (BLOCKS, 256, VOCABULARY)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 99), st.integers(1, 40))
def test_mixed_batches_change_no_greedy_token(tiny, runner, lengths, seed, chunk):
    """Sequences prefill in chunks and decode side by side in one batch; each generates what it would alone."""
    oracle = tiny[0]
    free = random.Random(seed).sample(range(BLOCKS), BLOCKS)
    prompts = [random_prompt(length, seed + i) for i, length in enumerate(lengths)]
    tables = [blocks_for(length + 4, free) for length in lengths]
    tokens, done = [list(prompt) for prompt in prompts], [0] * len(prompts)
    while any(len(row) < length + 4 for row, length in zip(tokens, lengths, strict=True)):
        active = [i for i in range(len(prompts)) if len(tokens[i]) < lengths[i] + 4]
        rows = []
        for i in active:
            part = tokens[i][done[i] : done[i] + chunk]
            last = done[i] + len(part) == len(tokens[i])
            rows.append(Row(part, done[i], tables[i], greedy_draw() if last else ()))
            done[i] += len(part)
        for i, samples in zip(active, runner.run(Batch(tuple(rows))), strict=True):
            tokens[i] += [sampled.token_id for sampled in samples]
    for prompt, row in zip(prompts, tokens, strict=True):
        assert row[len(prompt) :] == oracle_tokens(oracle, prompt, 4)


def test_logprobs_are_those_of_transformers(tiny, runner):
    prompt = random_prompt(30, 1)
    [[sampled]] = runner.run(Batch((Row(prompt, 0, [4, 9], greedy_draw()),)))
    with torch.inference_mode():
        expected = tiny[0](torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    best = expected.topk(2)
    assert [top.token_id for top in sampled.logprobs.top] == best.indices.tolist()
    assert [top.logprob for top in sampled.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_kv_moves_between_runners(tiny, runner):
    """What prefill computed in one runner, decode continues in another, in other blocks."""
    oracle, folder = tiny
    prompt = random_prompt(37, 2)
    runner.run(Batch((Row(prompt, 0, [3, 1, 2]),)))
    other = build_runner(folder, "float32", blocks=8, device="cpu")
    other.write_kv([7, 0, 5], 0, runner.read_kv([3, 1, 2], 0, 20))
    other.write_kv([7, 0, 5], 20, runner.read_kv([3, 1, 2], 20, 16))
    [[sampled]] = other.run(Batch((Row(prompt[36:], 36, [7, 0, 5], greedy_draw()),)))
    assert [sampled.token_id] == oracle_tokens(oracle, prompt, 1)


def test_block_copies_precede_the_forward_pass(tiny, runner):
    """A forked sequence goes on in a copy of the shared block while the original writes over its own."""
    oracle = tiny[0]
    prompt = random_prompt(20, 3)
    runner.run(Batch((Row(prompt, 0, [10, 11]),)))
    rows = (Row([5], 20, [10, 11], greedy_draw()), Row([6], 20, [10, 12], greedy_draw()))
    samples = runner.run(Batch(rows, copies=((11, 12),)))
    assert [s.token_id for [s] in samples] == [oracle_tokens(oracle, [*prompt, token], 1)[0] for token in (5, 6)]


def test_several_draws_share_one_row(runner):
    params = SamplingParams(max_tokens=4, temperature=2.0, seed=5)
    draws = tuple(Draw(params, index, 0, (), ()) for index in range(12))
    prompt = random_prompt(10, 4)
    [together] = runner.run(Batch((Row(prompt, 0, [1], draws),)))
    alone = [runner.run(Batch((Row(prompt, 0, [1], (draw,)),)))[0][0] for draw in draws]
    assert together == alone
    assert len({sampled.token_id for sampled in together}) > 3


def test_rows_without_draws_and_empty_batches_yield_nothing(runner):
    assert runner.run(Batch(())) == []
    assert runner.run(Batch((), copies=((0, 1),))) == []
    assert runner.run(Batch((Row([1, 2], 0, [0]),))) == [[]]


def test_read_kv_is_canonical(runner):
    runner.run(Batch((Row(random_prompt(20, 5), 0, [8, 6]),)))
    data = runner.read_kv([8, 6], 0, 20)
    assert data.shape == (3, 2, 20, 2, 8)
    assert np.array_equal(runner.read_kv([8, 6], 13, 5), data[:, :, 13:18])


def test_the_pool_is_as_large_as_the_memory_allows(tiny):
    layout = kv_layout_of(tiny[1], "float32")
    block = layout.bytes_per_token * BLOCK_TOKENS
    assert block == 3 * 2 * 16 * 2 * 8 * 4
    assert blocks_within(layout, 10 * block + 1, free=0) == 10
    assert blocks_within(layout, None, free=20 * block) == 10
    assert blocks_within(layout, None, free=1 << 50) == (1 << 30) // block
    with pytest.raises(InvalidArgument, match="do not hold one block"):
        blocks_within(layout, block - 1, free=0)


def test_free_memory_is_plausible():
    assert 1 << 20 < free_memory() < 1 << 50


def test_the_context_can_be_shortened_but_not_stretched(tiny):
    assert build_runner(tiny[1], blocks=4, max_model_len=100, device="cpu").max_model_len == 100
    assert build_runner(tiny[1], blocks=4, max_model_len=9999, device="cpu").max_model_len == 256


def test_by_default_all_devices_have_equal_kv():
    assert (resolve_dtype("auto"), resolve_dtype("auto", "float32"), resolve_dtype("float16")) == (
        "bfloat16",
        "float32",
        "float16",
    )
    for dtype, precision in (("bfloat16", "bf16"), ("float32", "float32"), ("float16", "float32")):
        assert resolve_precision(None, dtype, "cpu") == resolve_precision(None, dtype, "cuda") == precision
