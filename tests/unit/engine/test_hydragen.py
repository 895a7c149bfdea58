"""Prefixes that sequences share: found from block tables alone, and attended to as if nobody shared anything."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.api import EngineRequest, KvLayout, Sample, TokenOutput
from kvmesh.engine.attention.choice import checked_kernel, native_back_end
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.native import NativeAttention, PackedPool
from kvmesh.engine.attention.native_build import CannotBuild
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.attention.prefixes import Cost, shared_prefixes
from kvmesh.engine.attention.reference import ReferenceAttention
from kvmesh.engine.core import EngineCore
from kvmesh.engine.loading import load
from kvmesh.engine.runner import TorchRunner
from kvmesh.types import BLOCK_TOKENS, SamplingParams
from tests.unit.engine.tiny import VOCABULARY, tiny_model

BLOCKS = 400


@dataclass
class Forest:
    """Block tables that share prefixes as the branches of a tree do."""

    rng: random.Random
    free: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.free = self.rng.sample(range(BLOCKS), BLOCKS)

    def grow(self, trunk, depth):
        table = trunk + [self.free.pop() for _ in range(self.rng.randint(0, 12))]
        if depth == 0 or len(self.free) < 60 or self.rng.random() < 0.3:
            return [[*table, self.free.pop()] for _ in range(self.rng.randint(1, 3)) if len(self.free) > 30]
        return [leaf for _ in range(self.rng.randint(1, 3)) for leaf in self.grow(table, depth - 1)]

    def segments(self):
        leaves = [leaf for _ in range(self.rng.randint(1, 2)) for leaf in self.grow([], 3)]
        self.rng.shuffle(leaves)
        return [self.segment(leaf) for leaf in leaves]

    def segment(self, table):
        """The last block is the sequence's own; now and then it is a chunk of a prompt that reads the others."""
        tokens = self.rng.choice([1, 1, 1, 5])
        return Segment(BLOCK_TOKENS * (len(table) - 1) + self.rng.randint(0, 11), tokens, table)


def flat(segments):
    lengths = [len(segment.block_ids) for segment in segments]
    first = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
    full = np.array([s.start // BLOCK_TOKENS if s.tokens == 1 else 0 for s in segments], np.int32)
    return np.concatenate([s.block_ids for s in segments]).astype(np.int32), first, full


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), group=st.integers(1, 8), merge=st.integers(0, 6))
def test_prefixes_cover_each_table_from_its_first_block_without_gaps(seed, group, merge):
    segments = Forest(random.Random(seed)).segments()
    covered = [0] * len(segments)
    cost = Cost(group, merge)
    for prefix in shared_prefixes(*flat(segments), cost):
        assert cost.pays(len(prefix.members), prefix.end - prefix.first)
        spans = {tuple(segments[i].block_ids[prefix.first : prefix.end]) for i in prefix.members}
        assert len(spans) == 1
        for member in prefix.members:
            segment = segments[member]
            assert (segment.tokens, covered[member]) == (1, prefix.first)
            assert prefix.end <= segment.start // BLOCK_TOKENS
            covered[member] = prefix.end


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_without_a_cost_each_shared_block_is_read_once(seed):
    """Brute force: as many blocks are read as there are different ones among what may be shared."""
    segments = Forest(random.Random(seed)).segments()
    tables, first, full = flat(segments)
    read = int(full.sum()) - sum(
        (len(p.members) - 1) * (p.end - p.first) for p in shared_prefixes(tables, first, full, Cost(1, 0))
    )
    different = {block for s, count in zip(segments, full, strict=True) for block in s.block_ids[:count]}
    assert read == len(different)


@pytest.fixture(scope="module")
def kernel():
    try:
        return checked_kernel(KvLayout(1, 2, 8, "float32"))
    except CannotBuild as error:
        pytest.skip(f"no native kernel here: {error}")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), dtype=st.sampled_from(["float32", "bfloat16"]), heads=st.sampled_from([(2, 2), (6, 2)]),
    threads=st.sampled_from([1, 3]), window=st.sampled_from([None, 40]),
)  # fmt: skip
def test_attention_is_that_of_the_textbook(kernel, seed, dtype, heads, threads, window):
    layout = KvLayout(1, heads[1], 8, dtype)
    segments = Forest(random.Random(seed)).segments()
    packed, plain = PackedPool(layout, BLOCKS, kernel), KvPool(layout, BLOCKS)
    generator = np.random.default_rng(seed)
    everything = generator.standard_normal(layout.chunk_shape(BLOCKS * BLOCK_TOKENS), np.float32)
    if dtype == "bfloat16":
        everything = (everything.view(np.uint32) >> 16).astype(np.uint16)
    for pool in (packed, plain):
        pool.write(range(BLOCKS), 0, everything)
    torch.manual_seed(seed)
    tokens = sum(segment.tokens for segment in segments)
    q, k, v = (torch.randn(tokens, n, 8).to(getattr(torch, dtype)) for n in (heads[0], heads[1], heads[1]))
    shared, textbook = NativeAttention(packed, [window], threads, Cost(1, 0)), ReferenceAttention(plain, [window])
    for attention in (shared, textbook):
        attention.plan(segments)
    out, lse = shared.run_with_lse(0, q, k, v)
    torch.testing.assert_close(
        out.float(), textbook.run(0, q, k, v).float(), atol=2e-5 if dtype == "float32" else 3e-2, rtol=0
    )
    apart = NativeAttention(packed, [window], 1, None)
    apart.plan(segments)
    torch.testing.assert_close(lse, apart.run_with_lse(0, q, k, v)[1], atol=2e-5, rtol=1e-5)


def test_samples_of_one_prompt_are_those_of_an_engine_that_shares_nothing(tmp_path, kernel):
    """The engine's own block tables: parallel samples, and requests that hit the prefix cache."""
    model = load(tiny_model("llama", tmp_path)[1], "float32", "cpu")
    outputs = []
    for sharing in (Cost(1, 0), None):
        engine = EngineCore(TorchRunner(model, 128, None, native_back_end(kernel, 1, sharing)))
        prompt = tuple(random.Random(1).choices(range(3, VOCABULARY), k=150))
        params = SamplingParams(max_tokens=20, n=4, temperature=0.9, seed=3)
        engine.add(EngineRequest("samples", prompt, params, tuple(map(Sample, range(4)))))
        events = [event for _ in range(4) for event in engine.step()]
        for number in range(3):
            later = (*prompt[:120], 5, number + 3)
            engine.add(EngineRequest(f"{number}", later, SamplingParams(max_tokens=20, temperature=0.0)))
        while engine.has_work():
            events += engine.step()
        outputs.append([(e.request_id, e.index, e.token_id) for e in events if isinstance(e, TokenOutput)])
    assert outputs[0] == outputs[1]
