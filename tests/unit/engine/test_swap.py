"""Preempted sequences come back from host memory, or are computed again: the tokens are the same."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmesh.engine.api import EngineRequest, TokenOutput
from kvmesh.engine.cache.swap import SwapSpace
from kvmesh.engine.core import EngineCore
from kvmesh.engine.fake import FakeRunner
from kvmesh.types import SamplingParams


class Clocked(FakeRunner):
    """A fake that counts what it computes and copies."""

    def __init__(self, **options):
        super().__init__(**options)
        self.computed = self.written = 0

    def run(self, batch):
        self.computed += sum(len(row.token_ids) for row in batch.rows)
        return super().run(batch)

    def write_kv(self, block_ids, start, data):
        self.written += data.shape[2]
        super().write_kv(block_ids, start, data)


def engine_of(blocks, swap_tokens):
    runner = Clocked(blocks=blocks)
    engine = EngineCore(runner, max_running=8, token_budget=64, swap_bytes=swap_tokens * runner.layout.bytes_per_token)
    engine.scheduler.swap.compute.observe(1e9, 1)
    return engine


def run(engine, prompts, tokens, aborted=()):
    for number, prompt in enumerate(prompts):
        engine.add(EngineRequest(f"{number}", prompt, SamplingParams(max_tokens=tokens, seed=7)))
    outputs, steps = {}, 0
    while engine.has_work():
        steps += 1
        for event in engine.step():
            if isinstance(event, TokenOutput):
                outputs.setdefault(event.request_id, []).append(event.token_id)
        if steps == 30:
            for name in aborted:
                engine.abort(name)
        assert engine.scheduler.swap.used <= engine.scheduler.swap.tokens
    assert engine.check_integrity() == []
    assert engine.scheduler.swap.used == 0
    assert engine.statistics().blocks_used == 0
    return outputs


PROMPTS = [tuple(range(40 + number, 100 + number)) for number in range(6)]


def test_what_was_saved_is_not_computed_again():
    plenty, swapping, recomputing = engine_of(256, 0), engine_of(24, 2000), engine_of(24, 0)
    expected = run(plenty, PROMPTS, 50)
    assert run(swapping, PROMPTS, 50) == run(recomputing, PROMPTS, 50) == expected
    assert swapping.scheduler.swaps > 0
    assert recomputing.scheduler.swaps == 0
    assert swapping.runner.written > 0
    assert swapping.runner.computed == plenty.runner.computed < recomputing.runner.computed


@settings(max_examples=40, deadline=None)
@example(blocks=12, swap=48, tokens=18, prompts=[1, 16, 32, 33], aborted=set())
@given(
    blocks=st.integers(12, 40), swap=st.integers(0, 400), tokens=st.integers(1, 60),
    prompts=st.lists(st.integers(1, 90), min_size=2, max_size=6), aborted=st.sets(st.integers(0, 5)),
)  # fmt: skip
def test_no_size_of_pool_or_swap_space_changes_a_token(blocks, swap, tokens, prompts, aborted):
    prompts = [tuple(range(40, 40 + length)) for length in prompts]
    names = {str(number) for number in aborted if number < len(prompts)}
    whole = run(engine_of(256, 0), prompts, tokens)
    found = run(engine_of(blocks, swap), prompts, tokens, names)
    for name, output in found.items():
        assert output == whole[name][: len(output)]
        assert name in names or output == whole[name]


@pytest.mark.parametrize(("save", "load", "compute", "cheaper"), [(1, 1, 3, True), (2, 2, 3, False)])
def test_the_cheaper_way_is_taken(save, load, compute, cheaper):
    space = SwapSpace(100)
    assert not space.take(10)
    space.compute.observe(compute, 1)
    assert space.take(10)
    space.save.observe(save, 1)
    space.load.observe(load, 1)
    assert space.take(10) is cheaper
    assert not space.take(100)
