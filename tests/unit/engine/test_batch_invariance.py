"""With the native kernels a row's result does not depend, not in one bit, on what else is computed, and how.

Stricter than any comparison of greedy tokens: log-probabilities are equal as floats.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.api import EngineRequest, Failed, KvLayout, Sample, TokenOutput
from kvmesh.engine.attention.choice import checked_kernel, native_back_end
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.native import SHARING, NativeAttention, PackedPool
from kvmesh.engine.attention.native import Tables as NativeTables
from kvmesh.engine.attention.native_build import TARGETS, CannotBuild, load_library
from kvmesh.engine.core import EngineCore
from kvmesh.engine.linear import packing_of
from kvmesh.engine.linear.native import products
from kvmesh.engine.loading import load
from kvmesh.engine.runner import TorchRunner, kv_layout
from kvmesh.types import BLOCK_TOKENS, SamplingParams
from tests.unit.engine.native_kernel import AVX2, avx2_products
from tests.unit.engine.tiny import VOCABULARY, tiny_model

SHAPE = {
    "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}  # fmt: skip
FAMILIES = {"llama": {}, "mistral": {"sliding_window": 270}, "qwen3": {"head_dim": 32}}
TRUNK = tuple(random.Random(5).choices(range(VOCABULARY), k=560))
KV_HEADS, HEADS, HEAD_DIM, BLOCKS = 2, 6, 16, 1500


class Tables:
    """Segments that share parts of one trunk of blocks, and write to blocks of their own only."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.free = self.rng.sample(range(BLOCKS), BLOCKS)
        self.trunk = [self.free.pop() for _ in range(50)]

    def segment(self):
        shared = self.rng.choice([0, 0, 20, 37, 50, 50, 50])
        start = shared * BLOCK_TOKENS + self.rng.choice([0, self.rng.randint(0, 40), self.rng.randint(0, 500)])
        tokens = self.rng.choice([1, 1, 1, 1, 7, 90])
        own = (start + tokens - 1) // BLOCK_TOKENS + 1 - shared
        return Segment(start, tokens, self.trunk[:shared] + [self.free.pop() for _ in range(own)])


@pytest.mark.parametrize("targets", [TARGETS, [AVX2], [()]], ids=["this CPU", "AVX2", "any CPU"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32), dtype=st.sampled_from(["float32", "bfloat16"]), count=st.integers(1, 24),
    window=st.sampled_from([None, None, 40, 300]), threads=st.sampled_from([1, 2, 5]),
)  # fmt: skip
def test_attention(targets, seed, dtype, count, window, threads):
    """Decodes that share prefixes, chunks and prompts, by any number of threads: each as if it were alone."""
    layout, tables = KvLayout(1, KV_HEADS, HEAD_DIM, dtype), Tables(seed)
    try:
        pool = PackedPool(layout, BLOCKS, checked_kernel(layout, lambda: load_library(targets=targets)))
    except CannotBuild as error:
        pytest.skip(f"no native kernel here: {error}")
    torch.manual_seed(seed)
    pool.keys.copy_(torch.randn(pool.keys.shape))
    pool.values.copy_(torch.randn(pool.values.shape))
    segments = [tables.segment() for _ in range(count)]
    rows = [[torch.randn(s.tokens, n, HEAD_DIM).to(pool.dtype) for n in (HEADS, KV_HEADS, KV_HEADS)] for s in segments]
    alone, together = NativeAttention(pool, [window], 1, None), NativeAttention(pool, [window], threads, SHARING)
    expected = []
    for segment, (q, k, v) in zip(segments, rows, strict=True):
        alone.plan([segment])
        expected.append(alone.run_with_lse(0, q, k, v))
    together.plan(segments)
    found = together.run_with_lse(0, *map(torch.cat, zip(*rows, strict=True)))
    for part, parts in zip(found, zip(*expected, strict=True), strict=True):
        assert torch.equal(part, torch.cat(parts))


def test_prefixes_are_shared_there():
    tables = Tables(1)
    found = NativeTables(BLOCKS, SHARING)
    found.fill([tables.segment() for _ in range(24)])
    assert found.struct.prefixes > 0


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """By family and precision, each with the library that computes it."""
    folders = {name: tiny_model(name, tmp_path_factory.mktemp(name), **SHAPE | more) for name, more in FAMILIES.items()}
    native, avx2 = products(), avx2_products()
    if native is None or not native.integers:
        pytest.skip("no native products here")

    def decoder(folder, precision, library):
        packing = packing_of(precision, native=lambda: library)
        return load(folder, "bfloat16", precision=precision, packing=packing), library.library

    found = {(name, "AVX2"): decoder(folder, "bf16", avx2) for name, (_, folder) in folders.items()}
    for precision in ("bf16", "int8", "int4"):
        found |= {(name, precision): decoder(folder, precision, native) for name, (_, folder) in folders.items()}
    return found


def generate(decoder_and_library, requests, *, threads=1, blocks=400, **settings):
    """By request and sample: token ids with the log-probabilities of each."""
    decoder, library = decoder_and_library
    layout = kv_layout(decoder)
    runner = TorchRunner(decoder, blocks, None, native_back_end(checked_kernel(layout, lambda: library), threads))
    engine = EngineCore(runner, **settings)
    for request in requests:
        engine.add(request)
    outputs = {}
    for _ in range(3000):
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, TokenOutput):
                outputs.setdefault((event.request_id, event.index), []).append((event.token_id, event.logprobs))
        if not engine.has_work():
            break
    assert engine.check_integrity() == []
    return outputs, engine.statistics()


def request(name, prompt, samples=1, temperature=0.0):
    sampling = SamplingParams(max_tokens=12, temperature=temperature, seed=len(prompt), n=samples, logprobs=3)
    return EngineRequest(name, tuple(prompt), sampling, tuple(map(Sample, range(samples))))


@settings(max_examples=16, deadline=None)
@given(
    family=st.sampled_from(list(FAMILIES)), precision=st.sampled_from(["bf16", "int8", "int4", "AVX2"]),
    seed=st.integers(0, 2**32), threads=st.sampled_from([1, 3]), token_budget=st.sampled_from([24, 100, 512]),
    blocks=st.sampled_from([60, 100, 400]), swap_bytes=st.sampled_from([0, 1 << 20]),
)  # fmt: skip
def test_engine(decoders, family, precision, seed, threads, token_budget, blocks, swap_bytes):
    """Batches, chunks, forks, prefix reuse, sharing, and preemption where blocks are few: tokens, drawn ones too, and
    log-probabilities are those of each request alone."""
    rng, decoder = random.Random(seed), decoders[family, precision]
    requests = []
    for number in range(rng.randint(2, 12)):
        rest = rng.choices(range(VOCABULARY), k=rng.randint(1, 50))
        prompt = (*TRUNK[: rng.choice([0, 30, 300, 560, 560])], *rest)
        requests.append(request(f"{number}", prompt, rng.choice([1, 1, 4]), rng.choice([0.0, 0.9])))
    found, _ = generate(
        decoder, requests, threads=threads, blocks=blocks, token_budget=token_budget, max_running=16,
        swap_bytes=swap_bytes,
    )  # fmt: skip
    expected = {}
    for each in requests:
        expected |= generate(decoder, [each])[0]
    assert found == expected


def test_preemption_and_reuse_do_happen_here(decoders):
    requests = [request(f"{n}", (*TRUNK[:300], n), 4) for n in range(6)]
    _, statistics = generate(decoders["llama", "bf16"], requests, blocks=60, token_budget=100, max_running=16)
    assert statistics.hits_total > 0
    assert statistics.preemptions_total > 0
