"""The fast attention back end against the textbook one, and the KV pool's layout."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import KvPool, from_wire, to_wire
from kvmesh.engine.attention.reference import ReferenceAttention
from kvmesh.errors import InvalidArgument
from kvmesh.types import BLOCK_TOKENS

BLOCKS = 64


def layout(dtype: str = "float32", kv_heads: int = 2) -> KvLayout:
    return KvLayout(layers=2, kv_heads=kv_heads, head_dim=8, dtype=dtype)


def filled_pool(**shape) -> KvPool:
    pool = KvPool(layout(**shape), BLOCKS)
    pool.data.copy_(torch.randn(pool.data.shape, generator=torch.Generator().manual_seed(1)))
    return pool


def segments_of(lengths: list[tuple[int, int]], seed: int) -> list[Segment]:
    """Segments (start, tokens) with disjoint blocks in random order."""
    free = random.Random(seed).sample(range(BLOCKS), BLOCKS)
    if seed % 2:
        free.sort()
    blocks = iter(free)
    return [
        Segment(start, tokens, list(itertools.islice(blocks, -(-(start + tokens) // BLOCK_TOKENS))))
        for start, tokens in lengths
    ]


lengths = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(lengths, st.sampled_from([1, 2, 6]), st.sampled_from([None, 1, 5, 16, 33]), st.integers(0, 9))
def test_fast_equals_textbook(lengths, kv_heads, window, seed):
    segments = segments_of(lengths, seed)
    total = sum(segment.tokens for segment in segments)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(total, heads, 8, generator=generator) for heads in (6, kv_heads, kv_heads))
    outputs, pools = [], []
    for back_end in (CpuAttention, ReferenceAttention):
        pools.append(pool := filled_pool(kv_heads=kv_heads))
        attention = back_end(pool, [window, None])
        attention.plan(segments)
        outputs.append([attention.run(layer, q, k, v) for layer in (0, 1)])
    for fast, textbook in zip(*outputs, strict=True):
        assert fast.shape == q.shape
        torch.testing.assert_close(fast, textbook, atol=1e-5, rtol=0)
    assert torch.equal(pools[0].data, pools[1].data)


def test_a_window_hides_old_keys_and_shows_the_rest():
    """With values that name their position, one query returns the mean of exactly the keys it sees."""
    pool = KvPool(layout(), BLOCKS)
    pool.data.zero_()
    block_ids = [5, 3, 9]
    positions = np.arange(48, dtype=np.float32).reshape(1, 1, 48, 1, 1)
    values = np.broadcast_to(positions, layout().chunk_shape(48)).copy()
    values[:, 0] = 0
    pool.write(block_ids, 0, values)
    attention = CpuAttention(pool, [10, None])
    attention.plan([Segment(40, 1, block_ids)])
    k, v = torch.zeros(1, 2, 8), torch.full((1, 2, 8), 40.0)
    windowed, full = (attention.run(layer, torch.zeros(1, 6, 8), k, v) for layer in (0, 1))
    assert windowed.unique().tolist() == pytest.approx([sum(range(31, 41)) / 10])
    assert full.unique().tolist() == pytest.approx([20.0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kv_survives_a_move_to_other_blocks(dtype):
    source, target = filled_pool(dtype=dtype), filled_pool(dtype=dtype)
    data = source.read([7, 1, 4, 2], start=5, tokens=50)
    assert data.shape == layout(dtype).chunk_shape(50)
    assert data.dtype == layout(dtype).wire_dtype
    target.write([0, 9, 8, 3], start=5, data=data)
    assert np.array_equal(target.read([0, 9, 8, 3], 5, 50), data)
    untouched = filled_pool(dtype=dtype).read([0, 9, 8, 3], 0, 5)
    assert np.array_equal(target.read([0, 9, 8, 3], 0, 5), untouched)


def test_canonical_order_is_layer_kv_token_head_dim():
    pool = filled_pool()
    data = pool.read([6, 2], start=0, tokens=20)
    assert torch.equal(torch.from_numpy(data[1, 0, 17]), pool.data[1, 0, 2, 1])
    assert torch.equal(torch.from_numpy(data[0, 1, 3]), pool.data[0, 1, 6, 3])


def test_a_read_is_a_private_copy():
    pool = filled_pool()
    data = pool.read([3], 0, 16)
    before = data.copy()
    pool.data.zero_()
    assert np.array_equal(data, before)


def test_read_only_arrays_can_be_written():
    data = np.zeros(layout().chunk_shape(4), dtype=np.float32)
    data.flags.writeable = False
    pool = filled_pool()
    pool.write([1], 0, data)
    assert not pool.read([1], 0, 4).any()


def test_copies_happen_in_order():
    pool = filled_pool()
    first = pool.data[:, :, 1].clone()
    pool.copy([(1, 2), (2, 3)])
    assert torch.equal(pool.data[:, :, 3], first)


@pytest.mark.parametrize(
    "data",
    [np.zeros((2, 2, 4, 2, 8), np.float16), np.zeros((2, 2, 4, 2, 7), np.float32), np.zeros((2, 4, 2, 8), np.float32)],
    ids=["dtype", "shape", "rank"],
)
def test_kv_of_another_layout_is_refused(data):
    with pytest.raises(InvalidArgument, match="does not fit the layout"):
        filled_pool().write([0], 0, data)


def test_bfloat16_bits_are_exact():
    values = torch.randn(100).bfloat16()
    wire = to_wire(values)
    assert wire.dtype == np.uint16
    assert torch.equal(from_wire(wire, torch.bfloat16), values)
    assert wire[0] == np.float32(values[0].item()).view(np.uint32) >> 16
